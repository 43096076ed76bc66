"""Options of a job file against the dataclass of a family."""

from typing import Annotated

import pytest
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from samplers.errors import InputError
from samplers.models.options import parse_options


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class _Box:
    width: Annotated[int, Field(gt=0)]
    colour: str = "red"

    def __post_init__(self) -> None:
        if self.colour == "red" and self.width == 13:
            raise InputError("width 13 is not made in red")


def test_good_options_become_the_dataclass() -> None:
    assert parse_options(_Box, "box", {"width": "3"}) == _Box(width=3, colour="red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 1, "color": "red"}, "format 'box' has no option 'color'; did you mean 'colour'?"),
        ({"width": 1, "zzz": 0}, "format 'box' has no option 'zzz'; it has width, colour"),
        ({}, "model.options.width: Field required"),
        ({"width": 0}, "model.options.width: Input should be greater than 0 (got 0)"),
        ({"width": 13}, "model.options: width 13 is not made in red"),
    ],
)
def test_each_mistake_names_its_key(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_options(_Box, "box", options)
    assert str(caught.value).endswith(message)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InputError, match=r"options\.width: .*; .*no option 'hight'"):
        parse_options(_Box, "box", {"width": -1, "hight": 2})
