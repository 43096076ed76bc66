"""Turns the `options` of a job file's model into the frozen dataclass of its family, or says which key is
wrong.

Knows nothing of what an option means; types and ranges stand in the dataclasses.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from samplers.errors import InputError

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def parse_options(kind: type[T], family: str, options: Mapping[str, object]) -> T:
    """`options` as a `kind` (a pydantic dataclass that forbids extra keys).

    Raises InputError that names each wrong key; an unknown one brings the nearest known name.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        known: Any = kind
        names = [entry.name for entry in fields(known)]
        raise InputError(
            "; ".join(_complaint(dict(item), family, names) for item in error.errors())
        ) from None


def _complaint(item: Mapping[str, Any], family: str, names: list[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] in _UNKNOWN:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
        return f"model.options: format {family!r} has no option {key!r}; {hint}"
    if not key:  # raised by the dataclass about several options together
        return f"model.options: {item['msg'].removeprefix('Value error, ')}"
    given = "" if item["type"] == "missing" else f" (got {item['input']!r})"
    return f"model.options.{key}: {item['msg']}{given}"
