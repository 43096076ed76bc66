"""search.planning: which coordinates a search has, where they begin and end, and what it may spend."""

from types import SimpleNamespace
from typing import Any

import pytest

from samplers.errors import InputError
from samplers.sampling import DDIM, DDPM, EDM, Solver
from samplers.schedule import Schedule
from search.planning import Start, at_the_edge, strategy
from search.spec import SearchSpec
from search.strategies.adaptive import AdaptiveStrategy, Axis
from search.strategies.base import Strategy
from search.strategies.confirm import Confirmed
from search.strategies.paper import PaperStrategy


def planned(
    sampling: Solver | None = None, start: Start | None = None, dimension: int = 64, **search: Any
) -> Strategy:
    time = "sigma" if isinstance(sampling, EDM) else "discrete"
    return strategy(SearchSpec(**search), sampling or DDPM("ddpm", 20), time, dimension, start)  # type: ignore[arg-type]


def adaptive(*arguments: Any, **keywords: Any) -> AdaptiveStrategy:
    found = planned(*arguments, **keywords)
    assert isinstance(found, Confirmed)
    assert isinstance(found.strategy, AdaptiveStrategy)
    return found.strategy


def test_the_usual_search_is_over_the_mean_and_k_and_is_confirmed() -> None:
    found = planned(images=10_000)
    assert isinstance(found, Confirmed)
    assert (found.images, found.rungs) == (10_000, 4)
    inner = adaptive(images=10_000)
    assert (inner.nfe, inner.images, inner.rung, inner.budget) == (20, 10_000, 1000, 0)
    assert inner.protocol == PaperStrategy.of(20, "discrete")
    mean, k = inner.axes
    assert mean == Axis("mean", 1.0, 0.01, 0.9, 1.2)
    # The ends of the schedule move by 0.2 at most.
    assert (k.name, k.start, k.step) == ("k", 0.0, None)
    assert k.high * 19 / 2 == -k.low * 19 / 2 == pytest.approx(0.2)


def best(mean: float, k: float | None, nfe: int = 20) -> Any:
    """What `at_the_edge` asks of a result."""
    lambdas = Schedule.linear(nfe, k or 0.0, mean - (k or 0.0) * (nfe - 1) / 2).lambdas
    return SimpleNamespace(lambdas=lambdas, k=k, nfe=nfe, is_baseline=(mean, k) == (1.0, 0.0))


@pytest.mark.parametrize(
    ("found", "search", "said"),
    [
        (best(1.02, 0.003), {}, None),
        (
            best(0.901, 0.0),
            {},
            "the best mean λ lies at the edge of the search, 0.9: with another search.b.start",
        ),
        (best(1.2, 0.001), {}, "mean λ lies at the edge of the search, 1.2: with another search.b.stop"),
        (best(1.2, 0.001), {"b": {"stop": 1.4}}, None),
        (best(1.02, -0.02105), {}, "k lies at the edge of the search, -0.02105: with another search.k.start"),
        (best(1.02, 0.0), {"k": {"start": 0, "stop": 0}}, None),
        (best(1.0, 0.0), {"b": {"start": 1.0}}, None),
        (best(0.9, None), {}, None),
        (best(0.9, 0.0, nfe=1), {}, "search.b.start"),
    ],
)
def test_a_result_where_its_search_had_to_end_is_said_to_be(
    found: Any, search: dict[str, Any], said: str | None
) -> None:
    answer = at_the_edge(SearchSpec(**search), found)
    assert (answer is None) if said is None else (answer is not None and said in answer)


def test_a_sigma_based_network_is_searched_in_smaller_steps() -> None:
    assert adaptive(EDM("heun", 35)).axes[0].step == 0.002


def test_one_evaluation_has_no_k() -> None:
    assert [axis.name for axis in adaptive(DDPM("ddpm", 1)).axes] == ["mean"]
    assert [axis.name for axis in adaptive(DDPM("ddpm", 1), strategy="free").axes] == ["mean"]
    assert [axis.name for axis in adaptive(DDPM("ddpm", 2), strategy="free").axes] == ["mean", "k"]


@pytest.mark.parametrize(("nfe", "bends"), [(3, 1), (5, 3), (10, 8), (50, 8)])
def test_a_free_search_has_as_many_coordinates_as_evaluations_but_ten_at_most(nfe: int, bends: int) -> None:
    axes = adaptive(DDPM("ddpm", nfe), strategy="free").axes
    assert [axis.name for axis in axes] == ["mean", "k", *(f"bend{j}" for j in range(2, bends + 2))]
    assert all((axis.start, axis.low, axis.high) == (0, -0.2, 0.2) for axis in axes[2:])


@pytest.mark.parametrize(
    ("images", "dimension", "rung"),
    [
        (10_000, 64, 1000),
        (50_000, 64, 5000),
        (5000, 2048, 1000),  # half of the features
        (1000, 64, 100),
        (600, 300, 150),
        (5000, 64, 500),
        (7000, 64, 750),  # a whole number of blocks
        (64, 64, 50),
        (30, 64, 30),  # no more than there are
        (2, 2048, 2),
    ],
)
def test_an_exploration_has_a_tenth_of_the_images_but_enough_for_the_features(
    images: int, dimension: int, rung: int
) -> None:
    assert adaptive(images=images, dimension=dimension).rung == rung


def test_a_budget_grows_with_the_coordinates_unless_it_is_given() -> None:
    assert adaptive(images=1000).budget == 0
    assert adaptive(DDPM("ddpm", 5), images=1000, strategy="free").budget == 3 * 1200
    assert adaptive(DDPM("ddpm", 1), images=1000).budget == 0
    given = adaptive(images=1000, budget=777)
    assert (given.budget, given.protocol) == (777, None)


def test_ranges_and_the_first_step_are_those_of_the_job() -> None:
    mean, k = adaptive(b={"start": 0.95, "stop": 1.04, "step": 0.05}, k={"start": 0, "stop": 0.01}).axes
    assert mean == Axis("mean", 1.0, -0.05, 0.95, 1.04)  # no such step fits above
    assert k == Axis("k", 0.0, None, 0.0, 0.01)
    assert [axis.name for axis in adaptive(k={"start": 0, "stop": 0}).axes] == ["mean"]


def test_a_start_at_another_number_of_evaluations_has_the_same_lambda_at_its_ends() -> None:
    mean, k = adaptive(DDPM("ddpm", 50), Start(mean=1.012, k=0.004, nfe=20, job=1)).axes
    assert mean.start == 1.012
    assert k.start * 49 == pytest.approx(0.004 * 19, abs=1e-7)
    (mean,) = adaptive(DDPM("ddpm", 1), Start(mean=1.012, k=0.004, nfe=20, job=1)).axes
    assert mean.start == 1.012
    _, k = adaptive(DDPM("ddpm", 20), Start(mean=1.0, k=0.0, nfe=1, job=1)).axes
    assert k.start == 0


def test_a_start_outside_of_the_ranges_is_brought_to_their_ends() -> None:
    mean, k = adaptive(None, Start(mean=1.5, k=-1.0, nfe=20, job=1)).axes
    assert (mean.start, mean.step) == (1.2, -0.01)
    assert k.start == pytest.approx(k.low)
    low, _ = adaptive(None, Start(mean=0.5, k=0.0, nfe=20, job=1)).axes
    assert (low.start, low.step) == (0.9, 0.01)


def test_numbers_of_the_solver_begin_at_the_value_of_the_job() -> None:
    axes = adaptive(
        EDM("heun", 35, S_churn=40.0, S_noise=1.003),
        parameters={"S_noise": (1.0, 1.008), "S_churn": (0, 40)},
    ).axes
    assert axes[2] == Axis("S_noise", 1.003, pytest.approx(0.001), 1.0, 1.008)
    assert axes[3] == Axis("S_churn", 40.0, -5.0, 0.0, 40.0)  # from its upper end downwards
    assert adaptive(images=1000, sampling=DDIM("ddim", 20), parameters={"eta": (0, 1)}).budget == 1200


def test_the_paper_s_protocol_is_what_it_is_and_can_do_without_confirmation() -> None:
    found = planned(strategy="paper", confirm=0, b={"coarse": 0.01, "fine": 0.001})
    assert found == PaperStrategy.of(20, "discrete", {"coarse": 0.01, "fine": 0.001})
    assert isinstance(planned(strategy="paper"), Confirmed)
    start = Start(mean=1.012, k=0.004, nfe=20, job=1)
    assert planned(None, start, strategy="paper", confirm=0) == planned(strategy="paper", confirm=0)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"b": {"coarse": 0.1}}, "search.b.coarse is not a key: b takes start, stop, step"),
        ({"k": {"stride": 0.1}}, "search.k.stride is not a key: k takes start, stop"),
        ({"b": {"start": 1.1}}, r"search.b: \[1.1, 1.2\] must be a range of numbers that holds 1"),
        ({"b": {"start": 0.0}}, r"search.b: \[0.0, 1.2\] must be a range"),
        ({"b": {"stop": float("nan")}}, "search.b: .*must be a range"),
        ({"b": {"stop": float("inf")}}, "search.b: .*must be a range"),
        ({"k": {"start": float("-inf")}}, "search.k: .*must be a range"),
        ({"b": {"step": 0.0}}, "search.b.step is 0.0: it must be finite and above 0"),
        ({"b": {"step": float("nan")}}, "search.b.step is nan"),
        ({"b": {"step": float("inf")}}, "search.b.step is inf"),
        ({"k": {"start": 0.1, "stop": 0.2}}, "search.k: .*that holds 0"),
        ({"parameters": {"eta": (0, 1)}}, "search.parameters.eta: eta is no number of ddpm"),
        ({"strategy": "paper", "b": {"coarse": 0.0}}, "search.b.coarse"),
    ],
)
def test_a_mistake_is_named_with_its_key(search: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**search)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 2), "search.parameters.eta: eta must lie between 0 .*not 2"),
        (
            (0.5, 1),
            r"search.parameters.eta: \[0.5, 1.0\] must be a range that holds sampling.eta, which is 0",
        ),
        ((0, 0), r"search.parameters.eta: \[0.0, 0.0\] must be a range"),
        ((1, 0), "search.parameters.eta: .*must be a range"),
    ],
)
def test_a_range_of_a_parameter_that_cannot_be_is_named(given: tuple[float, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(DDIM("ddim", 20), parameters={"eta": given})
