"""Reading weight files: what is accepted, what is refused, and that nothing in a file is run."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from samplers.errors import InputError
from samplers.models.snapshot import read_snapshot
from samplers.models.weights import LEGACY_MAGIC, digest, read_state_dict


def test_floating_point_weights_become_float32_and_integers_stay(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(
        {"half": torch.ones(2).half(), "double": torch.ones(2).double(), "count": torch.tensor(3)}, path
    )
    state = read_state_dict(path)
    assert {name: value.dtype for name, value in state.items()} == {
        "half": torch.float32,
        "double": torch.float32,
        "count": torch.int64,
    }


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle"])
def test_a_file_that_wants_to_run_code_is_refused_before_it_runs(tmp_path: Path, layout: str) -> None:
    path, marker = tmp_path / "hostile.pt", tmp_path / "marker"
    content = {"weight": torch.zeros(2), "extra": _Hostile(marker)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"extra": _Hostile(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(InputError, match=r"hostile\.pt holds more than weights: it asks for .*system"):
        read_state_dict(path)
    assert not marker.exists()


DEEP_KEY = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."  # its hash overflows the stack of a loader
DOUBLED_KEY = (  # its hash takes 2^60 steps
    b"\x80\x02)q\x00"
    + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    + b"}h<K\x01s."
)
LEGACY = b"".join(pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, {}))


def archived(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, data in records.items():
            opened.writestr(f"weights/{name.strip()}", data)
    return file.getvalue()


BOMBS = {
    "compressed numbers": (
        archived({"data.pkl": b"\x80\x02}.", "data/0": bytes(10_000_000)}, zipfile.ZIP_DEFLATED),
        "has compressed records",
    ),
    "deep key": (archived({"data.pkl": DEEP_KEY}), "dictionary key of type tuple"),
    "deep key of the old format": (LEGACY + DEEP_KEY, "dictionary key of type tuple"),
    "doubled key": (archived({"data.pkl": DOUBLED_KEY}), "dictionary key of type tuple"),
    "nested tuples": (
        archived({"data.pkl": b"\x80\x02)" + b"\x85" * 200_000 + b"."}),
        "nested more than 100 deep",
    ),
    "operations": (archived({"data.pkl": b"\x80\x02" + b"N" * 1_000_001}), "more than 1000000 operations"),
    "a record twice": (
        archived({"data.pkl": b"\x80\x02}.", "data.pkl ": b"\x80\x02]."}),
        "several records of one name",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(tmp_path: Path, bomb: str) -> None:
    content, message = BOMBS[bomb]
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(InputError, match=rf"bomb\.pt .*{message}"):
        read_state_dict(tmp_path / "bomb.pt")


def test_tensors_that_claim_more_than_their_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stride.pt"
    torch.save({"weight": torch.zeros(1).expand(2**30, 8)}, path)
    with pytest.raises(InputError, match=r"stride\.pt is damaged: its tensors claim 34359738368 bytes"):
        read_state_dict(path)
    shared = torch.randn(1000)
    torch.save({"embedding": shared, "head": shared}, path)
    assert torch.equal(read_state_dict(path)["head"], shared)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_program_is_no_file_of_weights(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(InputError, match=r"program\.pt has compressed records.*TorchScript"):
        read_state_dict(tmp_path / "program.pt")


def test_devices_and_pipes_which_never_end_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zeros.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "zeros.pt"):
        for read in (read_state_dict, read_snapshot, digest):
            with pytest.raises(InputError, match=f"{name} cannot be read: it is no plain file"):
                read(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for read in (read_state_dict, digest):
        with pytest.raises(InputError, match=r"absent\.pt cannot be read: No such file"):
            read(tmp_path / "absent.pt")
        with pytest.raises(InputError, match=f"{tmp_path.name} cannot be read"):
            read(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"weight": torch.randn(100, 10)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(InputError, match=r"cut\.pt is damaged, or no state dict"):
        read_state_dict(path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "page.pt"
    path.write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"page\.pt is damaged, or no state dict"):
        read_state_dict(path)


def test_content_other_than_a_state_dict_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content, message in (
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict, where a state dict"),
        ({"ema": {"weight": torch.zeros(1)}}, "seem to lie under 'ema'"),
        ({"step": 4}, "entry 'step' is a int, not a tensor$"),
        ({"good": torch.zeros(1), "bad": torch.tensor([1.0, float("nan")])}, "'bad' holds NaN or infinity"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            read_state_dict(path)


def test_the_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
