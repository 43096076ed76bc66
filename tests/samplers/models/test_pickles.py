"""Pickles as plain data, and pickles that try to do something."""

import copyreg
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samplers.errors import InputError
from samplers.models.pickles import MAX_STEPS, Call, Global, Persistent, read_pickle

ADMITTED = frozenset({"collections.OrderedDict", "fractions.Fraction", "builtins.object"})


def refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_pickle(data, ADMITTED, "net.pkl")
    assert str(caught.value).startswith("net.pkl ")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1,
        "Σ",
        (),
        (1, 2, 3, 4, 5),
        [[], [1.5, "a"]],
        {"a": {1: ("b", 300, 70000)}},
        OrderedDict(x=OrderedDict(), y=[1]),
    ],
)
def test_plain_data_comes_out_as_it_went_in(value: object, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), ADMITTED, "net.pkl") == value


def test_what_is_long_and_what_is_shared_comes_out_whole() -> None:
    long = {"bytes": b"\0" * 100_000, "text": "t" * 70_000, "list": list(range(3000))}
    again = read_pickle(pickle.dumps([long, long], 4), ADMITTED, "net.pkl")
    assert again == [long, long]
    assert isinstance(again, list)
    assert again[0] is again[1]


def test_sets_come_out_as_lists() -> None:
    assert read_pickle(pickle.dumps({3}, 4), ADMITTED, "net.pkl") == [3]
    assert read_pickle(pickle.dumps(set(), 4), ADMITTED, "net.pkl") == []


def test_an_admitted_call_is_written_down_and_not_made(wire: Any) -> None:
    value = wire.Made("fractions.Fraction", (1, 0), {"a": 1})  # to make it would raise ZeroDivisionError
    for opcode in (pickle.REDUCE, pickle.NEWOBJ):
        call = read_pickle(
            wire.dumps(wire.Made(value.name, value.args, value.state, opcode)), ADMITTED, "net.pkl"
        )
        assert isinstance(call, Call)
        assert (call.name, call.args, call.state) == ("fractions.Fraction", (1, 0), {"a": 1})


def test_names_and_persistent_references_stay_names() -> None:
    assert read_pickle(b"cfractions\nFraction\n.", ADMITTED, "net.pkl") == Global("fractions.Fraction")
    key = pickle.dumps(("storage", "0"), 2)[:-1]
    assert read_pickle(key + b"Q.", ADMITTED, "net.pkl") == Persistent(("storage", "0"))


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


@pytest.fixture
def registered() -> Iterator[None]:
    """os.system under number 1 of the extension registry."""
    copyreg.add_extension("os", "system", 1)
    yield
    copyreg.remove_extension("os", "system", 1)
    copyreg.clear_extension_cache()


ATTACKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "reduce": (lambda cmd: b"\x80\x02cos\nsystem\n" + cmd + b"\x85R.", "asks for os.system"),
    "stack global": (
        lambda cmd: b"\x80\x04" + _text("os") + _text("system") + b"\x93" + cmd + b"\x85R.",
        "asks for os.system",
    ),
    "stack global of remembered names": (
        lambda cmd: (
            b"\x80\x04" + _text("os") + b"\x94" + _text("system") + b"\x94h\x00h\x01\x93" + cmd + b"\x85R."
        ),
        "asks for os.system",
    ),
    "names that replace others in the memo": (
        lambda cmd: (
            b"\x80\x04"
            + _text("collections")
            + b"q\x00"
            + _text("OrderedDict")
            + b"q\x01\x93)R"
            + _text("os")
            + b"q\x00"
            + _text("system")
            + b"q\x01"
            + b"h\x00h\x01\x93"
            + cmd
            + b"\x85R."
        ),
        "asks for os.system",
    ),
    "dotted stack global": (
        lambda cmd: b"\x80\x04" + _text("pathlib") + _text("os.system") + b"\x93" + cmd + b"\x85R.",
        "asks for pathlib.os.system",
    ),
    "inst": (lambda cmd: b"(" + cmd + b"ios\nsystem\n.", "uses the pickle opcode INST"),
    "obj": (lambda cmd: b"(cos\nsystem\n" + cmd + b"o.", "asks for os.system"),
    "build": (
        lambda cmd: (
            b"\x80\x02ctypes\nSimpleNamespace\n)\x81}"
            + _text("__setstate__")
            + b"cos\nsystem\nsb"
            + cmd
            + b"b."
        ),
        "asks for types.SimpleNamespace",
    ),
    "newobj_ex": (
        lambda cmd: b"\x80\x04csubprocess\nPopen\n((" + _text("sh") + _text("-c") + cmd + b"lt}\x92.",
        "asks for subprocess.Popen",
    ),
    "extension": (lambda cmd: b"\x80\x02\x82\x01" + cmd + b"\x85R.", "uses the pickle opcode EXT1"),
    "below the result": (
        lambda cmd: b"\x80\x02cos\nsystem\n" + cmd + b"\x85R0}.",
        "asks for os.system",
    ),
}
"""Per name: a pickle for the shell command whose opcodes are given, and what is said of it."""


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.usefixtures("registered")
def test_a_pickle_that_runs_a_command_elsewhere_runs_nothing_here(attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    build, message = ATTACKS[attack]
    data = build(_text(f"touch {canary}"))
    refused(data, f"{message}.*Nothing of it was run")
    assert not canary.exists()
    if attack != "newobj_ex":  # Popen comes to life in __init__, which NEWOBJ_EX does not call
        pickle.loads(data)
        assert canary.exists(), "the attack is none"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04(cfractions\nFraction\nK\x01K\x00o.", "opcode OBJ"),
        (b"\x80\x04cfractions\nFraction\n)}\x92.", "opcode NEWOBJ_EX"),
        (b"\x80\x02\x83\x01\x00.", "opcode EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
        (b"Pos.system\n.", "opcode PERSID"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (b"I1\n.", "opcode INT"),
        (b"\x80\x02K\x01)R.", "calls a int with a tuple"),
        (b"\x80\x02cfractions\nFraction\nK\x01R.", "calls a Global with a int"),
        (b"\x80\x02cfractions\nFraction\n)R)R.", "calls what fractions.Fraction returns"),
        (b"\x80\x04K\x01K\x02\x93.", "names a global by a int"),
        (b"\x80\x02]}b.", "gives a state to a list"),
        (b"\x80\x02cfractions\nFraction\n)R}b}b.", "gives a state to a Call"),
        (b"\x80\x02)K\x01a.", "puts items into a tuple"),
        (b"\x80\x02]K\x01K\x02s.", "puts items into a list"),
        (b"\x80\x02})K\x01s.", "dictionary key of type tuple"),
        (b"\x80\x02}NK\x01s.", "dictionary key of type NoneType"),
    ],
)
def test_opcodes_and_uses_that_no_network_needs_are_refused(data: bytes, message: str) -> None:
    refused(data, message)


BOMBS: dict[str, tuple[bytes, str]] = {
    "nested tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "nested more than 100 deep"),
    "nested lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested more than 100 deep"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b".", "damaged"),
    "long integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),
    "real long integer": (b"\x80\x02\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b".", "opcode LONG4"),
    "decimal integer": (b"L" + b"9" * 1_000_000 + b"L\n.", "damaged"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "damaged"),
    "byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", "damaged"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc.", "damaged"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}", "damaged"),
    "operations": (b"\x80\x02" + b"N" * (MAX_STEPS + 1), f"more than {MAX_STEPS} operations"),
    "deep key": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "dictionary key of type tuple"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(bomb: str) -> None:
    refused(*BOMBS[bomb])


def test_frames_and_memo_numbers_claim_nothing() -> None:
    claims = b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}r\xff\xff\xff\xff."
    assert read_pickle(claims, ADMITTED, "net.pkl") == {}


def test_doubling_by_memo_stays_as_small_as_its_file() -> None:
    # 2^60 ends, 120 references
    doubled = b"\x80\x04)\x94" + b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60)
    )
    value = read_pickle(doubled + b".", ADMITTED, "net.pkl")
    for _ in range(60):
        assert isinstance(value, tuple)
        assert value[0] is value[1]
        value = value[0]


def test_every_cut_of_a_pickle_is_refused(wire: Any) -> None:
    data = wire.dumps({"a": [1, (2.5, "b"), wire.Made("collections.OrderedDict")], "c": b"bytes", "d": None})
    assert read_pickle(data, ADMITTED, "net.pkl") == {"a": [1, (2.5, "b"), {}], "c": b"bytes", "d": None}
    for length in range(len(data)):
        refused(data[:length], "damaged")
