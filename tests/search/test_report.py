"""search.report: numbers as people write them, and the answer with its error bars."""

from types import SimpleNamespace

import pytest

from samplers.schedule import Schedule
from search.report import best_as_dict, best_as_text, duration, gain, number
from storage import Best


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


def best(**changes):
    fields = {
        "model": "m",
        "model_fingerprint": "w",
        "dataset": "d",
        "solver": "ddpm",
        "sampling": {},
        "nfe": 20,
        "k": 0.0008,
        "b": 1.0034,
        "lambdas": Schedule.linear(20, 0.0008, 1.0034).lambdas,
        "parameters": {},
        "distance": 30.0,
        "standard_error": 0.21,
        "baseline_distance": 40.0,
        "gain": 10.0,
        "gain_error": 0.15,
        "significant": True,
        "confirmed": True,
        "images": 10_000,
        "seed": 2**62,
        "metrics": {},
        "objective": "Fréchet distance",
        "evaluator": "e",
        "job_id": 3,
        "number": 7,
        "status": "finished",
        "strategy": "adaptive",
        "trials": 12,
        "network_evaluations": 400_000,
        "seconds": 65.0,
        "confirm_network_evaluations": 600_000,
        "confirm_seconds": 90.0,
    }
    return Best(**fields | changes)


def test_the_answer_has_error_bars_and_says_what_it_cost_and_which_random_numbers_it_stands_on():
    text = best_as_text(best())
    assert "k = 0.0008, b = 1.0034" in text
    assert (
        "distance 30.0000 ± 0.21 with 10,000 images, on random numbers that the search has not seen" in text
    )
    assert "λ = 1 gives 40.0000: a gain of 10.0000 ± 0.15 (25.0 %)" in text
    assert "found in 12 trials, 400,000 network evaluations, 1 min of device time" in text
    assert "confirmed with 600,000 more, 2 min" in text
    assert "no significant gain" not in text


def test_a_gain_within_its_noise_is_said_to_be_none():
    text = best_as_text(best(gain=0.2, gain_error=0.15, significant=False, distance=39.8))
    assert "that is no significant gain" in text


def test_what_is_not_known_is_left_out():
    unknown = dict.fromkeys(("standard_error", "baseline_distance", "gain", "gain_error", "significant"))
    text = best_as_text(best(**unknown, confirmed=False, confirm_network_evaluations=0))
    assert "±" not in text
    assert "λ = 1 gives" not in text
    assert "confirmed" not in text
    assert "on the search's own random numbers" in text


def test_a_free_schedule_shows_its_list_and_the_solver_s_numbers():
    free = Schedule.free([1.01, 1.0, 1.02])
    text = best_as_text(best(k=None, b=None, nfe=3, lambdas=free.lambdas, parameters={"eta": 0.25}))
    assert "λ_t per evaluation, free" in text
    assert "with eta 0.25" in text
    assert "λ_0 … λ_2: 1.01, 1, 1.02" in text


def test_another_objective_is_named_and_small_numbers_keep_their_digits():
    small = {"distance": 0.00123, "standard_error": 1e-5, "baseline_distance": 0.00234, "gain": 0.00111}
    text = best_as_text(best(objective="KID", **small, metrics={"frechet": 4.25}))
    assert "KID 0.00123 ± 1e-05 with 10,000 images" in text
    assert "λ = 1 gives 0.00234: a gain of 0.00111" in text
    assert "Fréchet distance 4.25" in text


def test_programs_find_the_agreed_keys_first_and_everything_else_after():
    found = best_as_dict(best())
    assert list(found)[:8] == ["model", "dataset", "solver", "nfe", "k", "b", "lambdas", "distance"]
    assert found["confirm_network_evaluations"] == 600_000
    assert found.keys() == Best.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(None, None, ""), (0.0, 0.0, ""), (1.5, 0.25, "+1.5000 ± 0.25"), (-0.5, None, "-0.5000")],
)
def test_a_gain_has_its_sign_and_the_baseline_has_none(value, error, text):
    assert gain(SimpleNamespace(gain=value, gain_error=error)) == text
