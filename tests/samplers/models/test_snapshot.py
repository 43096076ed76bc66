"""NVIDIA's snapshots: what is read of them, and files that are made to do harm."""

import io
import itertools
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from samplers.errors import InputError
from samplers.models.snapshot import read_snapshot


@pytest.fixture
def write(tmp_path: Path, wire: Any) -> Callable[[Any], Path]:
    """write(content): the file with that pickle."""

    def save(content: Any) -> Path:
        file = tmp_path / "net.pkl"
        file.write_bytes(content if isinstance(content, bytes) else wire.dumps(content))
        return file

    return save


def refused(file: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_snapshot(file)
    assert str(caught.value).startswith(str(file))


def network(nvidia: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A snapshot whose U-Net has these parameters and nothing else."""
    arguments = {"_init_args": (), "_init_kwargs": {}}
    model = nvidia.persistent("SongUNet", arguments, parameters)
    return {"ema": nvidia.persistent("EDMPrecond", arguments, modules={"model": model})}


def test_names_numbers_and_tensors_come_out(save_snapshot: Callable[..., Path]) -> None:
    snapshot = read_snapshot(save_snapshot("EDMPrecond", augment_dim=9, attributes={"label_dim": 10}))
    assert snapshot.precond.class_name == "EDMPrecond"
    assert snapshot.precond.attributes["sigma_max"] == float("inf")
    assert snapshot.precond.attributes["label_dim"] == 10
    assert snapshot.network.class_name == "SongUNet"
    assert snapshot.network.kwargs["channel_mult"] == (1, 2)
    assert snapshot.network.attributes["skip_scale"] == 0.5  # a NumPy scalar in the file
    assert snapshot.state["model.enc.8x8_conv.weight"].shape == (8, 3, 3, 3)
    assert snapshot.state["model.enc.4x4_down.conv0.resample_filter"].tolist() == [[[[0.25] * 2] * 2]]
    assert all(tensor.dtype == torch.float32 for tensor in snapshot.state.values())


def test_tensors_are_views_of_their_storage(nvidia: Any, wire: Any, write: Callable[..., Path]) -> None:
    storage = wire.Made("torch.storage._load_from_bytes", (nvidia.storage(torch.arange(12.0)),))
    content = network(nvidia, {"a": nvidia.parameter(storage, 2, (2, 3), (1, 3)), "b": None})
    assert read_snapshot(write(content)).state["model.a"].tolist() == [[2, 5, 8], [3, 6, 9]]


def test_half_precision_is_read_as_single(nvidia: Any, write: Callable[..., Path]) -> None:
    half = torch.tensor([0.1, -2.0]).half()
    tensor = read_snapshot(write(network(nvidia, {"a": nvidia.tensor(half)}))).state["model.a"]
    torch.testing.assert_close(tensor, half.float(), rtol=0, atol=0)


def test_both_spellings_of_numpy_are_read(save_snapshot: Callable[..., Path]) -> None:
    file = save_snapshot()
    content = file.read_bytes()
    old, new = (
        struct.pack("<I", len(name)) + name for name in (b"numpy.core.multiarray", b"numpy._core.multiarray")
    )
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    assert read_snapshot(file).network.attributes["skip_scale"] == 0.5


def archive(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        for name, data in records.items():
            opened.writestr(f"training-state/{name}", data)
    return file.getvalue()


def stored(wire: Any, key: str = "0", kind: str = "torch.FloatStorage") -> Any:
    """A storage of four numbers in an archive, by its persistent id."""
    return wire.Referred(("storage", wire.Named(kind), key, "cpu", 4))


def archived(nvidia: Any, wire: Any, storage: Any, size: tuple[int, ...] = (4,)) -> bytes:
    return bytes(wire.dumps(network(nvidia, {"a": nvidia.parameter(storage, 0, size, (1,))})))


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_an_archive_keeps_its_numbers_beside_the_pickle(
    nvidia: Any, wire: Any, write: Callable[..., Path]
) -> None:
    content = archived(nvidia, wire, stored(wire))
    file = write(archive({"data.pkl": content, "byteorder": b"little", "data/0": FOUR}))
    assert read_snapshot(file).state["model.a"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"data/0": FOUR, "byteorder": b"big"}, "big-endian"),
        ({}, "lacks the record 'data/0'"),
        ({"data/0": FOUR[:-1]}, "has 15 bytes"),
        ({"data/0": b""}, "has 0 bytes"),
        ({"data/0": FOUR[:-4]}, "reaches outside its storage"),
    ],
)
def test_an_archive_with_wrong_records_is_refused(
    nvidia: Any, wire: Any, write: Callable[..., Path], records: dict[str, bytes], message: str
) -> None:
    refused(write(archive({"data.pkl": archived(nvidia, wire, stored(wire)), **records})), message)


def test_an_archive_that_asks_for_other_things_is_refused(
    nvidia: Any, wire: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    outside = archived(nvidia, wire, stored(wire, key="../../secret"))
    refused(write(archive({"data.pkl": outside})), "no storage of float32")
    other = archived(nvidia, wire, stored(wire, kind="os.system"))
    refused(write(archive({"data.pkl": other})), "asks for os.system")
    canary = tmp_path / "canary"
    attack = pickle.dumps(Attack(f"touch {canary}"), 2)
    refused(write(archive({"data.pkl": attack})), "asks for (posix|os).system")
    assert not canary.exists()
    refused(write(archive({"data.pkl": attack})[:-30]), "is damaged, or no archive")


def test_a_zip_bomb_is_refused(nvidia: Any, wire: Any, write: Callable[..., Path]) -> None:
    zeros = {"data.pkl": archived(nvidia, wire, stored(wire)), "data/0": b"\0" * 10_000_000}
    refused(write(archive(zeros, zipfile.ZIP_DEFLATED)), "compressed records")
    honest = archive({"data.pkl": archived(nvidia, wire, stored(wire)), "data/0": FOUR})
    claimed = honest.replace(struct.pack("<II", 16, 16), struct.pack("<II", 2**31, 2**31))
    assert claimed != honest
    refused(write(claimed), "claims to hold more bytes")


def test_a_persistent_reference_outside_an_archive_is_no_storage(
    nvidia: Any, wire: Any, write: Callable[..., Path]
) -> None:
    content = network(
        nvidia, {"a": nvidia.parameter(stored(wire, kind="torch.storage._load_from_bytes"), 0, (4,), (1,))}
    )
    refused(write(content), "model.a has no storage")


class Attack:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that an attack would create."""
    return tmp_path / "canary"


def test_hostile_source_is_not_run(nvidia: Any, write: Callable[..., Path], canary: Path) -> None:
    class Hostile(nvidia):  # type: ignore[misc]
        source = f"open({str(canary)!r}, 'w')"

    assert read_snapshot(write(Hostile.snapshot())).network.class_name == "SongUNet"
    assert not canary.exists()
    exec(Hostile.source)
    assert canary.exists(), "the attack is none"


def test_hostile_source_in_nested_objects_is_not_run(
    nvidia: Any, wire: Any, write: Callable[..., Path], canary: Path
) -> None:
    class Hostile(nvidia):  # type: ignore[misc]
        source = f"open({str(canary)!r}, 'w')"

    inner = Hostile.persistent("Inner", {"_init_args": (), "_init_kwargs": {}})
    content = network(nvidia, {})
    content["ema"].args[0]["state"]["_init_kwargs"] = {"hook": inner}
    refused(write(content), "argument 'hook' of ema is no plain value")
    content = network(nvidia, {"weight": inner})
    refused(write(content), "model.weight is no tensor")
    deep = inner
    for _ in range(9):
        deep = Hostile.persistent("Outer", {}, modules={"child": deep})
    content["ema"].args[0]["state"]["_modules"]["model"].args[0]["state"]["_modules"] = {"enc": deep}
    content["ema"].args[0]["state"]["_modules"]["model"].args[0]["state"]["_parameters"] = {}
    refused(write(content), "nested more than 8 deep")
    maker = "torch_utils.persistence._reconstruct_persistent_obj"
    for other in (
        wire.Made(maker, ({"type": "function", "class_name": "f", "state": {}},)),
        wire.Made(maker, (inner, inner)),
        wire.Made(maker, (inner,)),
        wire.Made(maker, inner.args, {"__setstate__": inner}),
        wire.Made("torch._utils._rebuild_parameter", (inner,)),
    ):
        refused(write({"ema": other}), "ema is no module of the official code")
    assert not canary.exists()


def test_modules_that_are_shared_many_times_over_are_refused(nvidia: Any, write: Callable[..., Path]) -> None:
    """A small file of six modules that describes a tree of 16^6."""
    module = nvidia.persistent("Linear", {})
    for _ in range(6):
        module = nvidia.persistent("Outer", {}, modules={str(n): module for n in range(16)})
    content = network(nvidia, {})
    content["ema"].args[0]["state"]["_modules"]["model"].args[0]["state"]["_modules"] = {"enc": module}
    file = write(content)
    assert file.stat().st_size < 100_000
    refused(file, "more than 100000 modules and tensors")


def test_arguments_that_double_by_memo_are_refused(nvidia: Any, write: Callable[..., Path]) -> None:
    doubled: list[Any] = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    content = network(nvidia, {})
    content["ema"].args[0]["state"]["_init_kwargs"] = {"channel_mult": doubled}
    refused(write(content), "argument 'channel_mult' of ema is no plain value")
    content["ema"].args[0]["state"]["_init_kwargs"] = {"channel_mult": [1] * 65}
    refused(write(content), "argument 'channel_mult' of ema is no plain value")
    content["ema"].args[0]["state"]["_init_kwargs"] = {"embedding_type": "x" * 1001}
    refused(write(content), "argument 'embedding_type' of ema is no plain value")
    refused(write(doubled), "holds no averaged network")


def test_a_call_hidden_in_a_storage_is_not_made(
    nvidia: Any, wire: Any, write: Callable[..., Path], canary: Path
) -> None:
    attack = pickle.dumps(Attack(f"touch {canary}"), 2)
    true = nvidia.storage(torch.zeros(4))
    heads = [0]
    for _ in range(4):  # where each pickle of the stream ends
        stream = io.BytesIO(true[heads[-1] :])
        list(pickletools.genops(stream))
        heads.append(heads[-1] + stream.tell())
    streams = [attack] + [true[:start] + attack + true[end:] for start, end in itertools.pairwise(heads)]
    zipped = io.BytesIO()
    torch.save({"a": Attack(f"touch {canary}")}, zipped)
    for stream in [*streams, zipped.getvalue(), b"", b"abc"]:
        storage = wire.Made("torch.storage._load_from_bytes", (stream,))
        refused(
            write(network(nvidia, {"a": nvidia.parameter(storage, 0, (4,), (1,))})),
            "the storage of model.a (is damaged|holds more than weights: it asks for posix.system)",
        )
    assert not canary.exists()
    pickle.loads(attack)
    assert canary.exists(), "the attack is none"


def test_memory_that_is_claimed_and_not_there_is_refused(
    nvidia: Any, wire: Any, write: Callable[..., Path]
) -> None:
    four = nvidia.storage(torch.ones(4))
    assert four.count(b"K\x04N") == 1  # the number of elements in the reference to the storage
    for claimed in (b"J\xff\xff\xff\x7f", b"\x8a\x06" + (2**44).to_bytes(6, "little")):
        storage = wire.Made("torch.storage._load_from_bytes", (four.replace(b"K\x04N", claimed + b"N"),))
        content = network(nvidia, {"a": nvidia.parameter(storage, 0, (4,), (1,))})
        refused(write(content), "claims more numbers than it has bytes")
    storage = wire.Made("torch.storage._load_from_bytes", (four,))
    for offset, size, stride, message in (
        (0, (5,), (1,), "reaches outside"),
        (1, (4,), (1,), "reaches outside"),
        (0, (2**40, 2**40), (0, 0), "claim more bytes than the file has"),
        (0, (2**62, 2**62), (1, 1), "reaches outside"),
        (0, (0,), (1,), "reaches outside"),
        (0, (-1,), (1,), "no proper shape"),
        (0, (2, 2), (1,), "no proper shape"),
        (0, (1,) * 9, (1,) * 9, "no proper shape"),
        (0, (True,), (1,), "no proper shape"),
    ):
        refused(write(network(nvidia, {"a": nvidia.parameter(storage, offset, size, stride)})), message)
    many = {str(n): nvidia.parameter(storage, 0, (4,), (1,)) for n in range(3)}
    assert len(read_snapshot(write(network(nvidia, many))).state) == 3
    big = wire.Made("torch.storage._load_from_bytes", (nvidia.storage(torch.ones(10_000)),))
    many = {str(n): nvidia.parameter(big, 0, (10_000,), (1,)) for n in range(3)}
    refused(write(network(nvidia, many)), "claim more bytes than the file has")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("ema"), "holds no averaged network"),
        (lambda data: data.update(ema=None), "holds no averaged network"),
        (lambda data: data.update(ema=[1]), "ema is no module of the official code"),
        (lambda data: state(data).pop("_modules"), "ema has no _modules"),
        (lambda data: state(data).update(_modules={}), "the network is a EDMPrecond, not a preconditioned"),
        (lambda data: state(data).update(_parameters=[1]), "ema has no _parameters"),
        (lambda data: state(data).update(_buffers={1: None}), "ema has no _buffers"),
        (lambda data: state(data).update(_init_args=(1,)), "ema does not say how it was constructed"),
        (lambda data: state(data).pop("_init_kwargs"), "ema does not say how it was constructed"),
        (lambda data: state(data)["_parameters"].update(w=5), "w is no tensor"),
    ],
)
def test_what_is_no_network_is_refused(
    nvidia: Any, write: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = network(nvidia, {})
    change(content)
    refused(write(content), message)


def state(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["ema"].args[0]["state"]
    return found


def test_numbers_that_are_not_finite_are_refused(nvidia: Any, write: Callable[..., Path]) -> None:
    refused(
        write(network(nvidia, {"a": nvidia.tensor(torch.tensor([1, float("nan")]))})), "'model.a' holds NaN"
    )


def test_a_file_that_cannot_be_read_or_is_no_pickle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pkl", "cannot be read: No such file")
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html><html>")
    refused(tmp_path / "page.pkl", "is damaged, or no pickle")
    (tmp_path / "empty.pkl").write_bytes(b"")
    refused(tmp_path / "empty.pkl", "is damaged, or no pickle")


def test_a_cut_or_changed_file_is_refused_or_read_but_nothing_else_happens(
    save_snapshot: Callable[..., Path],
) -> None:
    file = save_snapshot()
    data = file.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        file.write_bytes(data[: chance.randrange(len(data))])
        with pytest.raises(InputError):
            read_snapshot(file)
    outcomes = set()
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 20))):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(changed)
        try:
            read_snapshot(file)
            outcomes.add("read")
        except InputError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
