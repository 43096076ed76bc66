"""Reads a pickle as plain data: what it would have called is written down, and nothing is called.

A pickle is a program for a stack machine. The standard library's `pickletools` takes it apart, and the machine here
has only the opcodes that make data, all written out below. Knows nothing of what the data means.
"""

import pickletools
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import BinaryIO

from samplers.errors import InputError

# A snapshot of the largest published network takes a quarter of a million steps and is nested thirty deep.
MAX_STEPS = 1_000_000
MAX_DEPTH = 100

_PLAIN = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function that the pickle asked for, one of those admitted."""

    name: str


@dataclass(slots=True, eq=False)
class Call:
    """A call that was not made: of `name` with `args`, and the state that the result was to get."""

    name: str
    args: tuple[object, ...]
    state: object = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside the pickle; in torch's files, a storage."""

    key: object


class _RefusedError(Exception):
    """The message follows the name of the file."""


def read_pickle(
    data: bytes | BinaryIO, admitted: Set[str] | None, source: str, expected: str = "pickle"
) -> object:
    """The object in `data`: None, bool, int, float, str, bytes, tuple, list, dict, Global, Call or Persistent.

    Sets come out as lists and ordered dictionaries as dictionaries; dictionary keys are str or int. data: bytes, or a
    file that stands at the pickle's beginning and afterwards behind its end. admitted: the globals that may be named,
    as "module.name"; None: any, where another reader is to judge them. Raises InputError that begins with `source`:
    for any other global (it is named), for opcodes that plain data has no use for, beyond MAX_STEPS operations or
    MAX_DEPTH levels, and for damage ("or no `expected`"). Time and memory stay within a small multiple of MAX_STEPS
    plus the size of `data`.
    """
    try:
        root = _run(data, admitted)
        _check_depth(root)
    except _RefusedError as error:
        raise InputError(f"{source} {error}. Nothing of it was run") from None
    except Exception as error:  # what damage makes of the stack, the memo or the text can raise anything
        raise InputError(f"{source} is damaged, or no {expected} ({type(error).__name__})") from error
    return root


def _run(data: bytes | BinaryIO, admitted: Set[str] | None) -> object:
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[object, object] = {}

    def since_mark() -> list[object]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for step, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if step == MAX_STEPS:
            raise _RefusedError(f"has more than {MAX_STEPS} operations, which no network needs")
        name = opcode.name
        if name in _PLAIN:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(items)
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "APPEND":
                    item = stack.pop()
                    _list(stack[-1]).append(item)
                case "APPENDS" | "ADDITEMS":
                    found = since_mark()
                    _list(stack[-1]).extend(found)
                case "EMPTY_DICT":
                    stack.append({})
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _fill(stack[-1], [key], [value])
                case "SETITEMS":
                    found = since_mark()
                    _fill(stack[-1], found[::2], found[1::2])
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(_global(str(arg).replace(" ", ".", 1), admitted))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_global(f"{_text(module)}.{_text(attribute)}", admitted))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(_call(function, args))
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case "BINPERSID":
                    stack.append(Persistent(stack.pop()))
                case _:
                    raise _RefusedError(f"uses the pickle opcode {name}, which no network needs")
    raise EOFError


def _global(name: str, admitted: Set[str] | None) -> Global:
    if admitted is not None and name not in admitted:
        raise _RefusedError(f"asks for {name[:200]}, which is not part of a network")
    return Global(name)


def _call(function: object, args: object) -> object:
    if isinstance(function, Call):
        raise _RefusedError(f"calls what {function.name[:200]} returns, which no network needs")
    if not isinstance(function, Global) or type(args) is not tuple:
        raise _RefusedError(f"calls a {type(function).__name__} with a {type(args).__name__}")
    if function.name in _DICTS and not args:
        return {}
    return Call(function.name, args)


def _build(target: object, state: object) -> None:
    if isinstance(target, Call) and target.state is None:
        target.state = state
    elif type(target) is not dict:  # the attributes of an ordered dictionary do not matter
        raise _RefusedError(f"gives a state to a {type(target).__name__}")


def _fill(target: object, keys: list[object], values: list[object]) -> None:
    if type(target) is not dict:
        raise _RefusedError(f"puts items into a {type(target).__name__}")
    for key, value in zip(keys, values, strict=True):
        if type(key) not in (str, int):  # hashing anything else may never end
            raise _RefusedError(f"has a dictionary key of type {type(key).__name__}")
        target[key] = value


def _list(value: object) -> list[object]:
    if type(value) is not list:
        raise _RefusedError(f"puts items into a {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise _RefusedError(f"names a global by a {type(value).__name__}")
    return value


def _check_depth(root: object) -> None:
    """Raises where MAX_DEPTH steps from container to content do not reach everything."""
    seen = {id(root)}
    level = [root]
    for _ in range(MAX_DEPTH):
        following = []
        for value in level:
            for part in _parts(value):
                if id(part) not in seen:
                    seen.add(id(part))
                    following.append(part)
        if not following:
            return
        level = following
    raise _RefusedError(f"is nested more than {MAX_DEPTH} deep, which no network is")


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, Call):
        return (value.args, value.state)
    return (value.key,) if isinstance(value, Persistent) else ()
