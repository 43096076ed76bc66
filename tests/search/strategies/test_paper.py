"""The paper's protocol: finds what was published, in few trials, and always ends."""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.errors import InputError
from search.strategies.base import FINISHED, WAIT, Candidate, Point, Signal, State
from search.strategies.paper import PaperStrategy

Time = Literal["discrete", "sigma"]
Curve = Callable[[float], float]
Surface = Callable[[float, float], float]
Trials = list[tuple[str, Point]]
Search = Callable[[PaperStrategy, Surface], Trials]
Through = Callable[..., Curve]
Table = Sequence[tuple[float, float]]


def best(trials: Trials) -> Point:
    """The answer of a search."""
    return min((point for _, point in trials if point.distance is not None), key=lambda p: p.distance or 0)


def best_uniform(trials: Trials) -> Point:
    return best([(phase, point) for phase, point in trials if point.k == 0])


def count(trials: Trials, *phases: str) -> int:
    return sum(phase in phases for phase, _ in trials)


def done(mean: float, k: float, distance: float) -> Point:
    return Point(mean, k, "complete", distance, 10_000)


def lattice(origin: float, stride: float, start: float, stop: float) -> list[float]:
    low, high = math.ceil((start - origin) / stride - 1e-6), math.floor((stop - origin) / stride + 1e-6)
    return [round(origin + i * stride, 9) for i in range(low, high + 1)]


# What was published


@pytest.mark.parametrize("steepness", [0.1, 0.3, 1, 3, 10, 30])
@pytest.mark.parametrize(
    ("row", "nfe", "time", "optimum"),
    [
        ("ADM NFE 100", 100, "discrete", 1.017),
        ("ADM NFE 50", 50, "discrete", 1.017),
        ("EDM NFE 35", 35, "sigma", 1.0006),
        ("EDM NFE 13", 13, "sigma", 1.006),
    ],
)
def test_the_published_b_is_found_in_at_most_10_trials(
    row: str,
    nfe: int,
    time: Time,
    optimum: float,
    steepness: float,
    published_b: Mapping[str, Table],
    through: Through,
    search: Search,
) -> None:
    curve = through(published_b[row], steepness)
    trials = search(PaperStrategy.of(nfe, time), lambda b, k: curve(b) + 1e4 * k**2)
    assert (best(trials).mean, best(trials).k) == (optimum, 0)
    assert count(trials, "coarse", "fine") <= 10


@pytest.mark.parametrize("steepness", [0.1, 0.3, 1, 3, 10, 30])
@pytest.mark.parametrize(
    ("row", "baseline", "uniform", "mean", "k"),
    [
        ("LSUN tower 64", 23.92, 8.22, 1.011, 0.0008),
        ("FFHQ 128", 59.35, 26.14, 1.008, 0.0004),
        ("ImageNet 64", 10.96, 7.52, 1.006, 0.0002),
    ],
)
def test_the_published_k_is_found_in_at_most_8_more_trials(
    row: str,
    baseline: float,
    uniform: float,
    mean: float,
    k: float,
    steepness: float,
    published_k: Mapping[str, Table],
    through: Through,
    search: Search,
) -> None:
    curve = through(published_k[row], steepness)

    def surface(b: float, k: float) -> float:
        return uniform + (baseline - uniform) * ((b - mean) / (mean - 1)) ** 2 + curve(k) - curve(0)

    trials = search(PaperStrategy.of(20, "discrete"), surface)
    assert (best(trials).mean, best(trials).k) == (mean, k)
    assert count(trials, "coarse", "fine") <= 10
    assert count(trials, "k") <= 8


@pytest.mark.parametrize(
    ("time", "optimum"),
    [("discrete", b) for b in (1.004, 1.005, 1.006, 1.007, 1.008, 1.011, 1.017)]
    + [("sigma", b) for b in (0.9983, 0.9985, 1.0005, 1.0006, 1.0034, 1.0035, 1.0043, 1.0045, 1.0048)]
    + [("sigma", b) for b in (1.0051, 1.006, 1.007)],
)
def test_every_published_b_is_found_on_a_parabola_in_at_most_10_trials(
    time: Time, optimum: float, search: Search
) -> None:
    trials = search(PaperStrategy.of(20, time), lambda b, k: ((b - optimum) / (optimum - 1)) ** 2 + k**2)
    assert best(trials).mean == optimum
    assert count(trials, "coarse", "fine") <= 10


@pytest.fixture(scope="module")
def recorded(shared: Path, through: Through) -> Callable[[str, int, str], Surface]:
    """The recorded distances of one solver and NFE at so many images, as a function of b and k."""
    runs = json.loads((shared / "reference" / "replay-adm-small.json").read_text())

    def surface_of(solver: str, nfe: int, images: str) -> Surface:
        own = [r for r in runs if (r["solver"], r["nfe"], r["seed"]) == (solver, nfe, 0)]
        over_b = through(sorted((r["mean_lambda"], r["distance"][images]) for r in own if r["k"] == 0))
        over_k: Curve = lambda k: 1e4 * k**2  # noqa: E731  # no k was recorded
        if any(r["k"] != 0 for r in own):
            over_k = through(
                sorted((r["k"], r["distance"][images]) for r in own if r["mean_lambda"] == 1.025)
            )
        return lambda b, k: over_b(b) + over_k(k) - over_k(0)

    return surface_of


def test_the_recorded_distances_of_ddpm_at_nfe_20_lead_to_the_recorded_optimum(
    recorded: Callable[[str, int, str], Surface], search: Search
) -> None:
    trials = search(PaperStrategy.of(20, "discrete"), recorded("ddpm", 20, "10000"))
    assert 1.022 <= best_uniform(trials).mean <= 1.030
    assert best(trials).k > 0.001
    assert best(trials).distance is not None
    assert best(trials).distance < 32.6  # type: ignore[operator]
    assert count(trials, "coarse", "fine") <= 10
    assert count(trials, "k") <= 10


@pytest.mark.parametrize(
    ("solver", "nfe", "low", "high"), [("ddpm", 50, 1.012, 1.018), ("ddim", 20, 0.990, 1.001)]
)
def test_the_recorded_distances_of_other_samplers_lead_to_their_optimum(
    solver: str,
    nfe: int,
    low: float,
    high: float,
    recorded: Callable[[str, int, str], Surface],
    search: Search,
) -> None:
    trials = search(PaperStrategy.of(nfe, "discrete"), recorded(solver, nfe, "10000"))
    assert low <= best_uniform(trials).mean <= high
    assert count(trials, "coarse", "fine") <= 10


def test_a_quarter_of_the_images_leads_to_the_same_b_within_two_strides(
    recorded: Callable[[str, int, str], Surface], search: Search
) -> None:
    few, all_ = (
        best_uniform(search(PaperStrategy.of(20, "discrete"), recorded("ddpm", 20, images))).mean
        for images in ("2500", "10000")
    )
    assert few == pytest.approx(all_, abs=0.0021)


# The steps of the protocol


def test_the_baseline_comes_first_and_alone() -> None:
    assert PaperStrategy.of(20, "discrete").next([]) == (Candidate("baseline", 1.0, 0.0),)


def test_the_phases_follow_each_other_with_the_strides_of_the_paper(search: Search) -> None:
    trials = search(PaperStrategy.of(20, "discrete"), lambda b, k: (b - 1.017) ** 2 + (k - 0.0008) ** 2)
    phases = [phase for phase, _ in trials]
    assert [phase for phase, _ in itertools.groupby(phases)] == ["baseline", "coarse", "fine", "k"]
    coarse = [point.mean for phase, point in trials if phase == "coarse"]
    assert coarse[:3] == [1.005, 1.015, 1.035]
    assert all(round((b - 1) / 0.005, 6).is_integer() for b in coarse)
    assert {1.016, 1.017, 1.018} <= {point.mean for phase, point in trials if phase == "fine"}
    on_k = {point.k for phase, point in trials if phase == "k"}
    assert {0.0006, 0.0008, 0.001} <= on_k
    assert {point.mean for phase, point in trials if phase == "k"} == {1.017}


def test_the_sigma_family_has_finer_strides(search: Search) -> None:
    strategy = PaperStrategy.of(35, "sigma")
    trials = search(strategy, lambda b, k: (b - 0.9985) ** 2 + (k + 0.00006) ** 2)
    assert (best(trials).mean, best(trials).k) == (0.9985, -0.00006)
    assert (strategy.b.coarse, strategy.b.fine, strategy.k.stride) == (0.001, 0.0001, 0.00002)


def test_both_sides_are_searched_where_the_start_is_best(search: Search) -> None:
    trials = search(PaperStrategy.of(20, "discrete"), lambda b, k: abs(b - 1) + abs(k))
    assert [(point.mean, point.k) for _, point in trials] == [
        (1.0, 0.0),
        (1.005, 0.0),
        (0.995, 0.0),
        (1.001, 0.0),
        (0.999, 0.0),
        (1.0, 0.0002),
        (1.0, -0.0002),
    ]


def test_a_flat_curve_keeps_the_baseline_and_ends_as_soon(search: Search) -> None:
    trials = search(PaperStrategy.of(20, "discrete"), lambda b, k: 3.0)
    assert len(trials) == 7


@pytest.mark.parametrize("sign", [1, -1])
def test_a_monotone_curve_ends_at_the_edges_of_the_ranges(sign: int, search: Search) -> None:
    strategy = PaperStrategy.of(
        20, "discrete", b={"start": 0.962, "stop": 1.043}, k={"start": -0.0031, "stop": 0.0053}
    )
    trials = search(strategy, lambda b, k: -sign * (b + k))
    assert (best(trials).mean, best(trials).k) == ((1.043, 0.0052) if sign == 1 else (0.962, -0.003))
    assert all(0.962 <= point.mean <= 1.043 and -0.0031 <= point.k <= 0.0053 for _, point in trials)


def test_a_cliff_behind_the_optimum_does_not_make_it_creep(search: Search) -> None:
    strategy = PaperStrategy.of(20, "sigma", b={"coarse": 0.0001, "stop": 2}, k={"start": 0, "stop": 0})
    trials = search(strategy, lambda b, k: 1.2 - b if b <= 1.2 else 1e6 * (b - 1.2))
    assert best(trials).mean == 1.2
    assert len(trials) <= 60  # 2,000 strides from the start


@pytest.mark.parametrize("nfe", [2, 3, 20, 1000])
def test_no_schedule_reaches_zero_however_wide_the_ranges(nfe: int, search: Search) -> None:
    wide = PaperStrategy.of(nfe, "discrete", b={"start": 1e-9, "stop": 2}, k={"start": -9, "stop": 9})
    for surface in (lambda b, k: b - abs(k), lambda b, k: -b - k, lambda b, k: -b + k):
        trials = search(wide, surface)
        assert all(min(Candidate("", p.mean, p.k).schedule(nfe).lambdas) > 0 for _, p in trials)
        assert len(trials) <= wide.most_trials


def test_strides_as_large_as_the_range_reach_no_zero(search: Search) -> None:
    strategy = PaperStrategy.of(
        3, "discrete", b={"coarse": 1, "fine": 1, "start": 1e-6}, k={"stride": 1, "start": -2}
    )
    trials = search(strategy, lambda b, k: b + k)
    assert [(point.mean, point.k) for _, point in trials] == [(1.0, 0.0)]


def test_the_default_range_of_k_keeps_every_lambda_near_its_mean(search: Search) -> None:
    for nfe in (5, 20, 100):
        trials = search(PaperStrategy.of(nfe, "discrete"), lambda b, k: (b - 1) ** 2 - k)
        lambdas = Candidate("", 1, best(trials).k).schedule(nfe).lambdas
        assert 1.19 < max(lambdas) <= 1.2 + 1e-9


def test_one_evaluation_has_no_slope_to_search(search: Search) -> None:
    trials = search(PaperStrategy.of(1, "sigma"), lambda b, k: (b - 1.002) ** 2)
    assert best(trials).mean == 1.002
    assert count(trials, "k") == 0


def test_ranges_of_one_value_search_nothing(search: Search) -> None:
    fixed_b = {"start": 1.0, "stop": 1.0}
    fixed_k = {"start": 0.0, "stop": 0.0}
    assert len(search(PaperStrategy.of(20, "discrete", b=fixed_b, k=fixed_k), lambda b, k: b + k)) == 1
    assert count(search(PaperStrategy.of(20, "discrete", k=fixed_k), lambda b, k: b + k), "k") == 0


def test_it_waits_for_the_running_trial() -> None:
    strategy = PaperStrategy.of(20, "discrete")
    baseline = Point(1.0, 0.0, "running", None, 0)
    assert strategy.next([baseline]) is WAIT
    assert strategy.next([done(1, 0, 9.0), Point(1.005, 0, "running", 5.0, 1000)]) is WAIT


def test_a_retry_hides_the_failure_before_it_and_a_success_hides_both() -> None:
    strategy = PaperStrategy.of(20, "discrete")
    failed, retry = Point(1.005, 0, "failed", None, 0), Point(1.005, 0, "running", None, 0)
    history = [done(1, 0, 9.0), failed]
    assert strategy.next(history) == (Candidate("coarse", 0.995, 0),)
    assert strategy.next([*history, retry]) is WAIT
    assert strategy.next([*history, retry, done(1.005, 0, 8.0)]) == (Candidate("coarse", 1.015, 0),)


@pytest.mark.parametrize("state", ["failed", "pruned", "complete"])
@pytest.mark.parametrize("distance", [None, math.nan, math.inf, -math.inf])
def test_a_point_without_a_comparable_number_is_never_best(state: State, distance: float | None) -> None:
    history = [done(1, 0, 9.0), Point(1.005, 0, state, distance, 500)]
    assert PaperStrategy.of(20, "discrete").next(history) == (Candidate("coarse", 0.995, 0),)


def test_a_pruned_point_is_not_best_though_its_number_is_lower() -> None:
    history = [done(1, 0, 9.0), Point(1.005, 0, "pruned", 1.0, 500)]
    assert PaperStrategy.of(20, "discrete").next(history) == (Candidate("coarse", 0.995, 0),)


def test_a_search_where_everything_fails_ends_after_three_trials(search: Search) -> None:
    trials = search(PaperStrategy.of(20, "discrete"), lambda b, k: math.nan)
    assert [point.mean for _, point in trials] == [1.0, 1.005, 0.995]


def test_a_failed_baseline_does_not_end_the_search(search: Search) -> None:
    trials = search(
        PaperStrategy.of(20, "discrete"), lambda b, k: math.nan if b == 1 else (b - 1.012) ** 2 + k**2
    )
    assert best(trials).mean == 1.012


def test_points_of_other_lattices_and_beyond_the_range_are_ignored() -> None:
    strategy = PaperStrategy.of(20, "discrete", b={"stop": 1.05})
    others = [done(1.0033, 0, 0.1), done(1.06, 0, 0.1), done(1.0, 0.00031, 0.1), done(1.01, 0.0002, 0.1)]
    assert strategy.next([done(1, 0, 9.0), *others]) == strategy.next([done(1, 0, 9.0)])


def test_a_known_good_point_is_used_as_if_it_had_been_proposed() -> None:
    """A store may hold trials of an earlier search: they count, and are not repeated."""
    history = [done(b, 0, (b - 1.02) ** 2) for b in (1.0, 1.015, 1.02, 1.025, 1.019)]
    assert PaperStrategy.of(20, "discrete").next(history) == (Candidate("fine", 1.021, 0),)


# What the job file may say


@pytest.mark.parametrize(
    ("b", "k", "named"),
    [
        ({"coarse": 0.0}, {}, "b.coarse"),
        ({"coarse": math.inf}, {}, "b.coarse"),
        ({"fine": -0.001}, {}, "b.fine"),
        ({"fine": math.nan}, {}, "b.fine"),
        ({"fine": 1e-9}, {}, "b.fine"),
        ({"fine": 0.01}, {}, "b.fine"),
        ({"fine": 0.002}, {}, "b.coarse"),
        ({"start": 0.0}, {}, "b.start"),
        ({"start": 1.01}, {}, "b.start"),
        ({"start": math.nan}, {}, "b.start"),
        ({"stop": 0.99}, {}, "b.stop"),
        ({"stop": math.inf}, {}, "b.stop"),
        ({"step": 0.1}, {}, "b.step"),
        ({}, {"stride": 0.0}, "k.stride"),
        ({}, {"start": 0.001}, "k.start"),
        ({}, {"start": -math.inf}, "k.start"),
        ({}, {"stop": -0.001}, "k.stop"),
        ({}, {"stop": math.nan}, "k.stop"),
        ({}, {"fine": 0.001}, "k.fine"),
    ],
)
def test_an_impossible_key_is_refused_by_name(
    b: Mapping[str, float], k: Mapping[str, float], named: str
) -> None:
    with pytest.raises(InputError, match=rf"^{re.escape(named)}\b"):
        PaperStrategy.of(20, "discrete", b=b, k=k)


def test_an_nfe_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="nfe"):
        PaperStrategy.of(0, "discrete")


def test_given_keys_replace_the_defaults_of_the_family() -> None:
    strategy = PaperStrategy.of(20, "discrete", b={"fine": 0.0005}, k={"stop": 0.004})
    assert (strategy.b.coarse, strategy.b.fine, strategy.b.start, strategy.b.stop) == (
        0.005,
        0.0005,
        0.9,
        1.2,
    )
    assert (strategy.k.stride, strategy.k.start, strategy.k.stop) == (0.0002, None, 0.004)


# What holds for every curve

thoroughly = settings(max_examples=150, deadline=None)

distances = st.one_of(
    st.floats(0, 100),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, 1.5, 2.0]),
)
states: st.SearchStrategy[State] = st.sampled_from(["complete", "complete", "complete", "failed", "pruned"])
outcomes = st.tuples(states, distances)
strategies = st.builds(
    PaperStrategy.of, st.sampled_from([1, 2, 13, 20, 50, 100, 1000]), st.sampled_from(["discrete", "sigma"])
)


@thoroughly
@given(strategies, st.data())
def test_any_outcomes_end_within_the_bound_and_every_step_is_legal(
    strategy: PaperStrategy, data: st.DataObject
) -> None:
    history: list[Point] = []
    tried: set[tuple[float, float]] = set()
    while (step := strategy.next(history)) is not FINISHED:
        assert not isinstance(step, Signal)
        (candidate,) = step
        assert candidate.key not in tried
        assert min(candidate.schedule(strategy.nfe).lambdas) > 0
        assert len(tried) <= strategy.expected_trials(history)
        tried.add(candidate.key)
        running = Point(candidate.mean, candidate.k, "running", None, 0)
        assert strategy.next([*history, running]) is WAIT
        state, distance = data.draw(outcomes)
        history.append(Point(candidate.mean, candidate.k, state, distance, 100))
    assert len(tried) <= strategy.most_trials
    assert strategy.expected_trials(history) == len(tried)
    assert_neighbours_are_not_better(strategy, history)


def assert_neighbours_are_not_better(strategy: PaperStrategy, history: Sequence[Point]) -> None:
    """The promise of a fine search, for b and for k."""
    value = {p.key: p.distance for p in history if p.state == "complete" and p.distance is not None}
    value = {key: distance for key, distance in value.items() if math.isfinite(distance)}
    known = {p.key for p in history}
    if not value:
        return
    uniform = {mean: distance for (mean, k), distance in value.items() if k == 0}
    if not uniform:
        return
    mean = min(uniform, key=lambda b: (uniform[b], round(abs(b - 1), 9), b))
    assert all(mean_ == mean for mean_, k in known if k != 0)
    for b in (mean - strategy.b.fine, mean + strategy.b.fine):
        if strategy.b.start <= round(b, 9) <= strategy.b.stop:
            assert (round(b, 9), 0.0) in known
    if strategy.nfe == 1:
        return
    over_k = {k: distance for (mean_, k), distance in value.items() if mean_ == mean}
    best_k = min(over_k, key=lambda k: (over_k[k], abs(k), k))
    for k in (best_k - strategy.k.stride, best_k + strategy.k.stride):
        if abs(k) <= 0.4 / (strategy.nfe - 1):
            assert (mean, round(k, 9)) in known


@thoroughly
@given(strategies, st.data())
def test_any_part_of_a_history_in_any_order_has_a_legal_next_step(
    strategy: PaperStrategy, data: st.DataObject
) -> None:
    history: list[Point] = []
    while isinstance(step := strategy.next(history), tuple):
        state, distance = data.draw(outcomes)
        history.append(Point(step[0].mean, step[0].k, state, distance, 100))
    part = data.draw(st.lists(st.sampled_from(history), max_size=2 * len(history)))
    step = strategy.next(part)
    assert strategy.next(data.draw(st.permutations(part))) == step
    assert strategy.next(part + part) == step
    if isinstance(step, tuple):
        assert step[0].key not in {p.key for p in part}
        assert min(step[0].schedule(strategy.nfe).lambdas) > 0
    else:
        assert step is FINISHED
    for _ in range(strategy.most_trials):  # and it goes on to an end from there
        if not isinstance(step := strategy.next(part), tuple):
            break
        part.append(done(step[0].mean, step[0].k, data.draw(st.floats(0, 10))))
    assert strategy.next(part) is FINISHED


@thoroughly
@given(
    nfe=st.sampled_from([13, 20, 50, 100]),
    b=st.floats(0.97, 1.08),
    k=st.floats(-0.004, 0.004),
    left=st.floats(0.05, 20),
    right=st.floats(0.05, 20),
    power=st.sampled_from([1.0, 1.5, 2.0, 4.0]),
)
def test_a_convex_curve_is_searched_to_the_best_point_of_the_lattice(
    nfe: int, b: float, k: float, left: float, right: float, power: float, search: Search
) -> None:
    def convex(x: float) -> float:
        return float((left * -x if x < 0 else right * x) ** power)

    def over_b(value: float) -> float:
        return convex((value - b) / 0.01)

    def over_k(value: float) -> float:
        return convex((value - k) / 0.001)

    trials = search(PaperStrategy.of(nfe, "discrete"), lambda b, k: over_b(b) + over_k(k))
    uniform = best_uniform(trials)
    assert over_b(uniform.mean) == min(map(over_b, lattice(1, 0.001, 0.9, 1.2)))
    assert over_k(best(trials).k) == min(map(over_k, lattice(0, 0.0002, -0.4 / (nfe - 1), 0.4 / (nfe - 1))))
    assert count(trials, "coarse", "fine") <= 30
    assert count(trials, "k") <= 30
