"""A job's `sampling` for sigma-based networks: what is scaled, where it starts, which levels are visited."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.generate import Sampler
from samplers.grids import Churn, sigma_grid
from samplers.models.edm import EdmModel, load_edm, load_pfgmpp
from samplers.models.ideal import IdealModel, PointCloud
from samplers.models.process import Process
from samplers.prediction import Prediction
from samplers.sampling import EDM
from samplers.schedule import Schedule
from samplers.solvers import edm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cloud() -> IdealModel:
    """Twenty points, denoised exactly."""
    points = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    return IdealModel(PointCloud(points), Process(sigma_range=(0.002, 80.0)))


def sampled(model: Any, sampling: EDM, schedule: Schedule) -> Tensor:
    """Four images of fixed noise."""
    plan = sampling.plan(model)
    numbers = torch.Generator().manual_seed(0)
    x = plan.start * torch.randn(4, *model.shape, generator=numbers, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + t), dtype=torch.float64)

    return plan.run(lambda x, t: model(x, float(plan.times[t]), None), schedule, x, noise, None)


def official(model: Any, sampling: EDM, schedule: Schedule, *, ablation: bool) -> Tensor:
    """The same with the division by λ written into the loop, as EDM-ES has it: D becomes x - (x - D)/λ."""
    churn = Churn(sampling.S_churn, sampling.S_min, float("inf"), sampling.S_noise)
    grid = sigma_grid(
        sampling.nfe,
        method=sampling.solver,
        discretization=sampling.discretization,
        schedule=sampling.schedule,
        scaling=sampling.scaling,
        churn=churn,
        limits=model.sigma_range,
    )

    def predict(x: Tensor, t: int) -> Prediction:
        sigma, s = float(grid.times[t]), float(grid.scale[t])
        image = x / s - sigma * model(x / s, sigma, None).eps
        lam = schedule.lambdas[t]
        if not ablation:
            image = x / s - (x / s - image) / lam
        elif sampling.solver == "euler" or t % 2 == 0:
            image = x - (x - image) / lam
        return Prediction((x - image) / sigma)

    numbers = torch.Generator().manual_seed(0)
    x = grid.start * torch.randn(4, *model.shape, generator=numbers, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1 + t), dtype=torch.float64)

    return edm(predict, x, grid, noise)


@pytest.mark.parametrize("rule", ["paper", "edm-es-ablation"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"discretization": "vp", "schedule": "vp", "scaling": "vp"},
        {"discretization": "ve", "schedule": "ve"},
        {"S_churn": 20.0, "S_noise": 1.007},
    ],
)
def test_scaling_the_network_equals_scaling_inside_the_loop(
    cloud: IdealModel, rule: Any, solver: Any, settings: dict[str, Any]
) -> None:
    sampling = EDM(solver=solver, nfe=9, rule=rule, **settings)
    schedule = Schedule.linear(9, 0.002, 0.99)
    out = sampled(cloud, sampling, schedule)
    inside = official(cloud, sampling, schedule, ablation=rule != "paper")
    # the last digits; steps of the ve schedule are so long that Heun leaves the range of the data
    torch.testing.assert_close(out, inside, rtol=0, atol=1e-12 * max(10, float(inside.abs().max())))


def test_the_rules_differ_in_heun_s_corrections_and_in_the_scaled_state(cloud: IdealModel) -> None:
    schedule = Schedule.uniform(9, 1.01)
    vp: dict[str, Any] = {"discretization": "vp", "schedule": "vp", "scaling": "vp"}
    for solver, settings, same in (("euler", {}, True), ("heun", {}, False), ("euler", vp, False)):
        paper = EDM(solver=solver, nfe=9, **settings)
        difference = (
            sampled(cloud, paper, schedule) - sampled(cloud, replace(paper, rule="edm-es-ablation"), schedule)
        ).abs()
        assert (float(difference.max()) == 0) == same, (solver, settings)


def test_without_scaling_the_rules_are_one(cloud: IdealModel) -> None:
    one = Schedule.uniform(9, 1.0)
    paper = EDM(solver="heun", nfe=9, scaling="vp", schedule="vp", discretization="vp")
    ablation = replace(paper, rule="edm-es-ablation")
    torch.testing.assert_close(sampled(cloud, paper, one), sampled(cloud, ablation, one), rtol=0, atol=0)


def test_a_network_of_few_levels_is_only_asked_at_those(
    save_snapshot: Callable[..., Path], nvidia: Any
) -> None:
    levels = torch.cat([torch.linspace(90, 0.01, 1000), torch.zeros(1)])
    file = save_snapshot("iDDPMPrecond", buffers={"u": nvidia.tensor(levels)})
    times = EDM(solver="heun", nfe=9).plan(load_edm(file, {})).times
    assert set(times) <= set(levels.double().tolist())
    assert times[-1] == pytest.approx(80, abs=0.1)


class Told:
    """A model that remembers the states it was shown."""

    def __init__(self, model: EdmModel) -> None:
        self.model, self.states = model, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        self.states.append(x)
        return self.model(x, time, labels)


def test_sampling_starts_at_the_prior_where_there_is_one(save_snapshot: Callable[..., Path]) -> None:
    file = save_snapshot(attributes={"pfgmpp": True, "D": 128, "N": 192})
    model: Any = Told(load_pfgmpp(file, {}))
    sampler = Sampler(model, EDM(solver="heun", nfe=3), CPU, seed=3)
    images = sampler.images(Schedule.uniform(3, 1.0), 5, 9)
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(model.states[0], model.prior(3, torch.arange(5, 9)), rtol=0, atol=0)
    alone = [sampler.images(Schedule.uniform(3, 1.0), i, i + 1) for i in range(5, 9)]
    assert (torch.cat(alone).int() - images.int()).abs().max() <= 1  # float32 rounding at a pixel's edge


def test_a_prior_goes_with_no_scaling_of_the_state(save_snapshot: Callable[..., Path]) -> None:
    model = load_pfgmpp(save_snapshot(attributes={"pfgmpp": True, "D": 128, "N": 192}), {})
    with pytest.raises(InputError, match=r"sampling\.scaling: this network starts from a prior of its own"):
        EDM(solver="heun", nfe=3, scaling="vp").plan(model)


def test_elsewhere_sampling_starts_at_the_first_level_times_the_latents(cloud: IdealModel) -> None:
    assert EDM(solver="heun", nfe=3).plan(cloud).start == pytest.approx(80)
    scaled = EDM(solver="euler", nfe=3, scaling="vp", sigma_max=3.0).plan(cloud)
    assert scaled.start == pytest.approx(3 / 10**0.5)
