"""The adaptive search on recorded noise, on the published tables, and on everything that a history may hold."""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.search import PUBLISHED, Recording, World, adaptive, paper, regrets, replay, through
from objectives.paired import BLOCK
from search.strategies.adaptive import AdaptiveStrategy, Axis
from search.strategies.base import FINISHED, WAIT, Candidate, Point, Signal, bend_basis
from search.strategies.paper import PaperStrategy

MEAN = Axis("mean", 1.0, 0.01, 0.9, 1.2)
K = Axis("k", 0.0, None, -0.02, 0.02)

BEND = Axis("bend2", 0.0, None, -0.3, 0.3)
ETA = Axis("eta", 1.0, -0.1, 0.0, 1.0)

Distance = Callable[[Candidate], float]


def ample(axes: int) -> int:
    """A budget that leaves little to the noise."""
    return round(10_000 * (0.4 + 1.6 * axes))


def strategy(*axes: Axis, nfe: int = 20) -> AdaptiveStrategy:
    return AdaptiveStrategy(nfe, axes, 10_000, 500, ample(len(axes)))


def measured(candidate: Candidate, value: float, images: int | None = None) -> Point:
    n = images or candidate.images or 10_000
    return Point(
        candidate.mean,
        candidate.k,
        "complete" if math.isfinite(value) else "failed",
        value,
        n,
        candidate.bends,
        candidate.parameters,
        rungs={n: value},
    )


def search(searched: AdaptiveStrategy, distance: Distance) -> list[Point]:
    """The history of a whole search without noise."""
    history: list[Point] = []
    while not isinstance(step := searched.next(history), Signal):
        history += [measured(candidate, distance(candidate)) for candidate in step]
        assert len(history) < 200
    assert step is FINISHED
    return history


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording()


# ---- recorded noise


@pytest.mark.parametrize("axes", [1, 2])
def test_on_recorded_noise_it_ends_near_the_best_distance_at_a_fifth_of_the_cost(
    recording: Recording, axes: int
) -> None:
    """Also by `python -m benchmarks.search`, which prints the distributions."""
    lost, images = [], []
    for seed in range(200):
        world = World(recording, seed)
        outcome = replay(adaptive(axes), world)
        lost.append(regrets(world, outcome, axes)[0])
        images.append(outcome.images)
    usual = np.mean([replay(paper(axes), World(recording, seed)).images for seed in range(40)])
    assert np.mean(np.array(lost) <= 0.05) >= 0.95
    assert max(images) <= 0.2 * usual


def test_it_measures_nothing_twice_and_does_not_depend_on_the_order_of_the_history(
    recording: Recording,
) -> None:
    searched = adaptive(2)
    outcome = replay(searched, World(recording, 3))
    rng = np.random.default_rng(0)
    shuffled = list(outcome.history)
    for _ in range(5):
        rng.shuffle(shuffled)  # type: ignore[arg-type]
        assert searched.next(shuffled) is FINISHED
        assert searched.finalists(shuffled) == searched.finalists(outcome.history)
        assert searched.loss(shuffled) == pytest.approx(searched.loss(outcome.history))
    assert len({(p.setting, p.images) for p in outcome.history}) == len(outcome.history)
    assert searched.expected_trials(outcome.history) == len(outcome.history)
    assert searched.expected_trials([]) > 5


def test_k_is_a_finalist_before_the_uniform_λ(recording: Recording) -> None:
    world = World(recording, 5)
    searched = adaptive(2)
    first, second = searched.finalists(replay(searched, world).history)
    assert first.k > 0.002
    assert second.k == 0
    assert (
        world.true(np.array(first.mean), np.array(first.k))
        < world.true(np.array(second.mean), np.array(0.0)) - 1
    )


# ---- published tables


@pytest.mark.parametrize(
    ("name", "noise"), [("ADM NFE 100", 0.06), ("ADM NFE 50", 0.05), ("EDM NFE 13", 0.05)]
)
def test_a_published_table_ends_within_its_noise_of_the_best(name: str, noise: float) -> None:
    curve, best = through(PUBLISHED[name]), min(fid for _, fid in PUBLISHED[name])
    searched = strategy(Axis("mean", 1.0, 0.001 if "EDM" in name else 0.01, 0.9, 1.2))
    history = search(searched, lambda candidate: curve(candidate.mean))
    (found,) = searched.finalists(history)
    assert curve(found.mean) <= best + noise
    assert len(history) < 20


def test_the_stride_becomes_as_fine_as_edm_needs() -> None:
    searched = strategy(Axis("mean", 1.0, 0.001, 0.9, 1.2))
    history = search(searched, lambda c: 1.947 + 6.4e4 * (c.mean - 1.00063) ** 2)
    (found,) = searched.finalists(history)
    assert found.mean == pytest.approx(1.00063, abs=1e-4)


def test_recorded_replays_end_at_their_best(shared: Path) -> None:
    rows = json.loads((shared / "reference" / "replay-adm-small.json").read_text())
    for solver, nfe in (("ddpm", 20), ("ddpm", 50), ("ddim", 20)):
        of = [r for r in rows if (r["solver"], r["nfe"], r["k"], r["seed"]) == (solver, nfe, 0, 0)]
        tables = {
            n: sorted((r["mean_lambda"], r["distance"][str(n)]) for r in of) for n in (1000, 2500, 10_000)
        }
        curves = {n: through(table) for n, table in tables.items()}

        def distance(candidate: Candidate, curves: dict[int, Callable[[float], float]] = curves) -> float:
            images = candidate.images or 10_000
            return curves[max(n for n in curves if n <= max(images, 1000))](candidate.mean)

        searched = strategy(MEAN, nfe=nfe)
        found = searched.finalists(search(searched, distance))
        mean = found[0].mean if found else 1.0
        assert curves[10_000](mean) <= min(value for _, value in tables[10_000]) + 0.5, (solver, nfe, mean)


# ---- what curves may be


@pytest.mark.parametrize("least", [0.985, 0.9985, 1.0, 1.0006, 1.017, 1.08])
def test_a_minimum_on_either_side_of_1_is_found(least: float) -> None:
    searched = strategy(MEAN)
    history = search(searched, lambda c: 5 + 4000 * (c.mean - least) ** 2)
    found = searched.finalists(history)
    assert (found[0].mean if found else 1.0) == pytest.approx(least, abs=2e-3)


def test_a_flat_curve_ends_without_many_trials() -> None:
    searched = strategy(MEAN, K)
    assert len(search(searched, lambda c: 5.0)) < 40


def test_a_curve_that_falls_to_the_edge_ends_there() -> None:
    searched = strategy(Axis("mean", 1.0, 0.01, 0.9, 1.05))
    history = search(searched, lambda c: 30 - 100 * c.mean)
    assert searched.finalists(history)[0].mean == pytest.approx(1.05, abs=2e-3)


def test_a_region_without_numbers_is_kept_out_of() -> None:
    searched = strategy(MEAN, K)
    history = search(searched, lambda c: math.nan if c.mean > 1.012 else 30 + 12_000 * (c.mean - 1.02) ** 2)
    (found, *_) = searched.finalists(history)
    assert 1.005 < found.mean <= 1.0125


def test_where_every_trial_fails_the_search_ends_with_nothing() -> None:
    searched = strategy(MEAN, K)
    assert len(search(searched, lambda c: math.nan)) <= 2
    assert searched.finalists([measured(Candidate("baseline", 1, 0, images=500), math.nan)]) == ()
    assert searched.finalists([]) == ()


def test_it_waits_for_what_is_running() -> None:
    assert strategy(MEAN).next([Point(1.0, 0.0, "running", None, 0)]) is WAIT


def test_a_trial_that_stops_early_is_tried_once_more() -> None:
    searched = strategy(MEAN)
    (baseline,) = searched.next([])  # type: ignore[misc]
    stopped = Point(1.0, 0.0, "pruned", 40.0, 250, rungs={250: 40.0})
    assert searched.next([stopped]) == (baseline,)
    assert searched.next([stopped, stopped]) is FINISHED


def test_trials_on_fresh_numbers_do_not_count() -> None:
    searched = strategy(MEAN)
    assert searched.next(
        [Point(1.0, 0.0, "complete", 3.0, 10_000, fresh=True, rungs={500: 3.0})]
    ) == searched.next([])


def test_what_a_longer_trial_adds_changes_nothing_that_was_decided(recording: Recording) -> None:
    searched, world = adaptive(2), World(recording, 7)
    outcome = replay(searched, world)
    longer = [*outcome.history, *(world.measure(p.mean, p.k, 10_000) for p in outcome.history)]
    assert searched.next(longer) is FINISHED
    assert searched.finalists(longer) == searched.finalists(outcome.history)


# ---- more coordinates


def test_options_of_the_solver_are_searched_inside_their_bounds() -> None:
    noise = Axis("s_noise", 1.0, 0.005, 0.98, 1.02)
    searched = strategy(MEAN, noise)

    def distance(candidate: Candidate) -> float:
        value = dict(candidate.parameters).get("s_noise", 1.0)
        assert 0.98 <= value <= 1.02
        return 5 + 4000 * (candidate.mean - 1.01) ** 2 + 3000 * (value - 1.008) ** 2

    first, *others = searched.finalists(search(searched, distance))
    assert first.mean == pytest.approx(1.01, abs=2e-3)
    assert dict(first.parameters)["s_noise"] == pytest.approx(1.008, abs=2e-3)
    assert all(candidate.parameters == () for candidate in others)


@pytest.mark.parametrize(("nfe", "seconds"), [(5, 0.5), (20, 5.0)])
def test_every_list_of_λ_can_be_searched(nfe: int, seconds: float) -> None:
    """With noise as large as recorded along each coordinate. The time limit is ten times what it takes alone."""
    bends = [Axis(f"bend{j}", 0.0, None, -0.3, 0.3) for j in range(2, nfe)]
    searched = strategy(MEAN, K, *bends, nfe=nfe)
    rng = np.random.default_rng(0)
    least = 1.02 + 0.03 * bend_basis(nfe)[0]
    slopes = rng.normal(size=(nfe, 2000)) * math.sqrt(4 * 0.09 * 1000 / BLOCK / nfe) / 0.018

    def true(away: np.ndarray) -> float:
        """A change of shape matters a quarter of what the same change of the mean does, as recorded for k."""
        return 12_000 * float(away.mean() ** 2 + away.var() / 4)

    history: list[Point] = []
    slowest = 0.0
    while True:
        began = time.perf_counter()
        step = searched.next(history)
        slowest = max(slowest, time.perf_counter() - began)
        if isinstance(step, Signal):
            break
        for candidate in step:
            away = np.array(candidate.schedule(nfe).lambdas) - least
            images = candidate.images or 10_000
            influence = away @ slopes[:, : images // BLOCK]
            value = 33 + true(away) + float(influence.mean())
            history.append(
                Point(
                    candidate.mean, candidate.k, "complete", value, images, candidate.bends,
                    rungs={images: value}, influence=(influence - influence.mean()).astype(np.float32),
                )
            )  # fmt: skip
    spent = {p.setting: p.images for p in sorted(history, key=lambda p: p.images)}
    assert sum(spent.values()) <= ample(nfe)
    assert slowest < seconds

    finalists = searched.finalists(history)
    assert not all(candidate.bends for candidate in finalists)
    best = min(true(np.array(candidate.schedule(nfe).lambdas) - least) for candidate in finalists)
    assert best < 0.5 * true(1.02 - least)


# ---- properties


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    least=st.floats(0.85, 1.3),
    gone=st.floats(0.8, 1.4),
    rough=st.sampled_from([0.0, 0.1, 3.0]),
    failing=st.sampled_from([0.0, 0.3, 1.0]),
    axes=st.sampled_from([(MEAN,), (MEAN, K), (MEAN, K, BEND, ETA)]),
)
def test_any_history_leads_to_a_legal_step_and_ends(
    seed: int, least: float, gone: float, rough: float, failing: float, axes: tuple[Axis, ...]
) -> None:
    rng = np.random.default_rng(seed)
    searched = strategy(*axes)
    history: list[Point] = []
    for _ in itertools.count():
        rng.shuffle(history)  # type: ignore[arg-type]
        step = searched.next(history)
        assert step == searched.next(history[::-1])
        if isinstance(step, Signal):
            assert step is FINISHED
            break
        assert step
        for candidate in step[: rng.integers(1, len(step) + 1)]:
            assert min(candidate.schedule(20).lambdas) > 0
            assert all(a.low <= candidate.mean <= a.high for a in axes if a.name == "mean")
            known = [p for p in history if p.setting == candidate.setting]
            assert not any(math.isfinite(p.at(candidate.images or 0)) for p in known)
            there = candidate.mean < gone
            value = 30 + 3000 * (candidate.mean - least) ** 2 + rough * rng.normal() if there else math.nan
            images = candidate.images if rng.random() >= failing / 2 else (candidate.images or 0) // 2
            history.append(measured(candidate, value if rng.random() >= failing / 2 else math.nan, images))
            history += history[-1:] * int(rng.random() < 0.2)
        assert len(history) < 400
    for finalist in searched.finalists(history):
        assert min(finalist.schedule(20).lambdas) > 0
    assert searched.expected_trials(history) == len(history)


def test_the_history_of_another_strategy_is_used() -> None:
    """Full trials that are there already answer for their positions."""
    curve = through(PUBLISHED["ADM NFE 50"])
    protocol = PaperStrategy.of(20, "discrete", k={"start": 0.0, "stop": 0.0})
    history: list[Point] = []
    while not isinstance(step := protocol.next(history), Signal):
        history += [
            Point(
                c.mean,
                c.k,
                "complete",
                curve(c.mean),
                10_000,
                rungs={500: curve(c.mean), 10_000: curve(c.mean)},
            )
            for c in step
        ]
    searched = strategy(MEAN)
    step = searched.next(history)
    assert step is FINISHED or all((c.mean, c.k) != (1.0, 0.0) for c in step)
