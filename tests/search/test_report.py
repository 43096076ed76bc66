"""search.report: numbers as people write them."""

import pytest

from search.report import duration, number


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (1.017, "1.017"), (0.1 + 0.2, "0.3"), (-0.0002, "-0.0002"), (None, "–")]
)
def test_numbers_have_no_digits_that_nobody_wrote(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.56, "4.6 s"), (45, "45 s"), (90, "2 min"), (3600, "1 h 00"), (7500, "2 h 05")]
)
def test_durations_are_as_coarse_as_people_need(seconds, text):
    assert duration(seconds) == text
