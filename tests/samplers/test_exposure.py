"""samplers.exposure: the norms follow the closed forms of data whose score is known, and late starts are exact."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import noise
from samplers.errors import InputError, NonFiniteError
from samplers.exposure import FORWARD_DRAW, Norms, late_start, levels, noised, observe_training, plan_of
from samplers.generate import INITIAL_DRAW, Sampler
from samplers.models.ideal import Gaussian, IdealModel, PointCloud
from samplers.models.process import Process
from samplers.sampling import DDIM, DDPM, EDM, LDM, AnalyticDDPM, Solver
from samplers.schedule import Schedule

CPU = torch.device("cpu")
SHAPE = (1, 2, 2)
D = 4
DISCRETE = Process.of("discrete", "cosine", 1000, 0, 1)
SIGMA = Process.of("sigma", "", 0, 0.01, 10.0)
SOLVERS: dict[str, Solver] = {
    "ddpm": DDPM("ddpm", 8, variance="fixed_large", clip=False),
    "ddim": DDIM("ddim", 8, respacing="8", clip=False),
    "euler": EDM("euler", 8),
    "heun": EDM("heun", 9),
}


def sampler(solver: Solver, distribution: Any) -> Sampler:
    process = SIGMA if isinstance(solver, EDM) else DISCRETE
    return Sampler(IdealModel(distribution, process), solver, CPU, seed=5)


def normal(std: float) -> Gaussian:
    return Gaussian(np.zeros(SHAPE), np.full(SHAPE, std**2))


def seen(of: Sampler, schedule: Schedule, images: int) -> tuple[list[float], list[Tensor]]:
    """Mean norms, and the states [images, D], of each evaluation in sampling."""
    norms, states = Norms(schedule.nfe, CPU), defaultdict(list)

    def observe(t: int, x: Tensor, eps: Tensor) -> None:
        norms.add(t, eps)
        states[t].append(x.flatten(1).double())

    of.images(schedule, 0, images, observe)
    return norms.means, [torch.cat(states[t]) for t in range(schedule.nfe)]


def chi(variance: float) -> float:
    """E‖x‖₂ of x ~ N(0, variance·I) in D dimensions."""
    return math.sqrt(2 * variance) * math.gamma((D + 1) / 2) / math.gamma(D / 2)


def variances(solver: Solver, std: float, schedule: Schedule) -> list[float]:
    """The variance of a value of the state that the network sees at each evaluation, for N(0, std²) data."""
    of = sampler(solver, normal(std))
    plan, at, lam = plan_of(of), levels(of), schedule.lambdas

    def eps(t: int) -> float:  # of a state x: this times x
        alpha, sigma = at[t]
        return sigma / (alpha**2 * std**2 + sigma**2) / lam[t]

    found, variance = [0.0] * schedule.nfe, plan.start**2
    t = schedule.nfe - 1
    while t >= 0:
        alpha, sigma = at[t]
        before, added = (at[t - 1] if t else (1.0, 0.0)), 0.0
        found[t] = variance
        if solver.solver in ("ddim", "euler"):
            x0 = (1 - sigma * eps(t)) / alpha
            slope, t = before[0] * x0 + before[1] * eps(t), t - 1
        elif solver.solver == "ddpm":
            beta = 1 - alpha**2 / before[0] ** 2
            x0 = (1 - sigma * eps(t)) / alpha
            slope = before[0] * beta / sigma**2 * x0 + math.sqrt(1 - beta) * before[1] ** 2 / sigma**2
            added, t = (beta if t else 0.0), t - 1
        elif t == 0:  # the last step of Heun is one of Euler
            slope, t = 1 - sigma * eps(0), -1
        else:
            ahead = 1 + (before[1] - sigma) * eps(t)
            found[t - 1] = variance * ahead**2
            slope = 1 + (before[1] - sigma) * (eps(t) + eps(t - 1) * ahead) / 2
            t -= 2
        variance = variance * slope**2 + added
    return found


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", ["λ = 1", "linear"])
def test_norms_and_states_of_gaussian_data_follow_their_recursion(name: str, schedule: str) -> None:
    solver, std, images = SOLVERS[name], 0.5, 20_000
    lam = (
        Schedule.linear(solver.nfe, 0.01, 1.02) if schedule == "linear" else Schedule.uniform(solver.nfe, 1.0)
    )
    of = sampler(solver, normal(std))
    norms, states = seen(of, lam, images)
    wanted = variances(solver, std, lam)
    for t, (alpha, sigma) in enumerate(levels(of)):
        assert float(states[t].square().mean()) == pytest.approx(wanted[t], rel=0.02), t
        gain = sigma / (alpha**2 * std**2 + sigma**2)  # of the network, which knows no λ
        assert norms[t] == pytest.approx(gain * chi(wanted[t]), rel=0.01), t


@pytest.mark.parametrize("name", SOLVERS)
def test_norms_in_training_on_gaussian_data_are_those_of_its_marginals(name: str) -> None:
    solver, std, images = SOLVERS[name], 0.5, 20_000
    of = sampler(solver, normal(std))
    norms = Norms(solver.nfe, CPU)
    ids = torch.arange(images)
    x0 = std * noise.normal(9, ids, 0, SHAPE, torch.float64)
    observe_training(of, x0, ids, lambda t, x, eps: norms.add(t, eps))
    for t, (alpha, sigma) in enumerate(levels(of)):
        variance = alpha**2 * std**2 + sigma**2
        assert norms.means[t] == pytest.approx(sigma / variance * chi(variance), rel=0.01), t


def test_data_of_one_point_has_no_exposure_bias_along_the_straight_path_of_euler() -> None:
    # eps(x, sigma) = x/sigma: from sigma_max·z the state is sigma_t·z at every level, as in training.
    solver = EDM("euler", 8)
    of = sampler(solver, PointCloud(np.zeros((1, *SHAPE))))
    z = noise.normal(5, torch.arange(100), INITIAL_DRAW, SHAPE, torch.float64).flatten(1)
    norms, states = seen(of, Schedule.uniform(8, 1.0), 100)
    training = Norms(8, CPU)
    ids = torch.arange(100)
    observe_training(of, torch.zeros(100, *SHAPE), ids, lambda t, x, eps: training.add(t, eps))
    for t, (_, sigma) in enumerate(levels(of)):
        torch.testing.assert_close(states[t], sigma * z, rtol=1e-12, atol=1e-12)
        assert norms[t] == pytest.approx(float(z.norm(dim=1).mean()), rel=1e-12)
        fresh = noise.normal(5, ids, FORWARD_DRAW + t, SHAPE, torch.float64).flatten(1)
        assert training.means[t] == pytest.approx(float(fresh.norm(dim=1).mean()), rel=1e-12)


def test_scaling_leaves_noise_behind_on_data_of_one_point() -> None:
    # Each Euler step takes 1/λ of what it should: x_{t-1} = x_t·(1 + (sigma_{t-1}/sigma_t - 1)/λ).
    lam = 1.1
    of = sampler(EDM("euler", 8), PointCloud(np.zeros((1, *SHAPE))))
    plain, _ = seen(of, Schedule.uniform(8, 1.0), 100)
    norms, _ = seen(of, Schedule.uniform(8, lam), 100)
    sigma = [s for _, s in levels(of)]
    excess = 1.0
    for t in reversed(range(8)):
        assert norms[t] == pytest.approx(plain[t] * excess, rel=1e-12)
        if t:
            excess *= (1 + (sigma[t - 1] / sigma[t] - 1) / lam) * sigma[t] / sigma[t - 1]


TAILS: dict[str, Solver] = {
    **SOLVERS,
    "clipped ddpm": DDPM("ddpm", 8, variance="fixed_small"),
    "ddim with noise": DDIM("ddim", 8, respacing="8", eta=0.7),
    "heun with churn": EDM("heun", 9, S_churn=4),
    "euler, vp": EDM(
        "euler", 8, discretization="vp", schedule="vp", scaling="vp", sigma_min=0.02, sigma_max=10
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_sampling_from_a_state_on_the_way_ends_where_the_whole_way_does(name: str) -> None:
    solver = TAILS[name]
    of = sampler(solver, PointCloud(np.random.default_rng(0).uniform(-1, 1, (6, *SHAPE))))
    schedule = Schedule.linear(solver.nfe, 0.01, 1.0)
    states: dict[int, Tensor] = {}
    whole = of.images(schedule, 0, 10, lambda t, x, eps: states.setdefault(t, x.clone()) if t == 4 else None)
    plan = plan_of(of)
    assert plan.tail is not None
    tail = plan.tail(4)
    assert tail.times.tolist() == plan.times[:5].tolist()
    end = tail.run(
        of.network(tail.times, None),
        Schedule.free(schedule.lambdas[:5]),
        tail.start * states[4],
        lambda t: noise.normal(5, torch.arange(10), t + 1, SHAPE, solver.state_dtype),
        None,
    )
    assert torch.equal(of.model.pixels(end), whole)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_from_a_real_image_with_little_noise_gives_that_image(name: str) -> None:
    points = np.array([[-0.6, 0.2, 0.6, -0.2], [0.6, -0.6, 0.2, 0.2]]).reshape(2, *SHAPE)
    of = sampler(SOLVERS[name], PointCloud(points))
    x0 = torch.from_numpy(points)
    images = late_start(of, Schedule.uniform(SOLVERS[name].nfe, 1.0), 2, x0, torch.arange(2))
    assert (images.int() - of.model.pixels(x0).int()).abs().max() <= 1


def test_a_real_image_has_the_same_noise_in_any_batch_and_other_noise_at_another_evaluation() -> None:
    of = sampler(SOLVERS["euler"], normal(1.0))
    x0 = torch.zeros(6, *SHAPE)
    whole = noised(of, 3, x0, torch.arange(6), (1.0, 2.0))
    assert torch.equal(noised(of, 3, x0[4:], torch.arange(4, 6), (1.0, 2.0)), whole[4:])
    assert not torch.equal(noised(of, 2, x0, torch.arange(6), (1.0, 2.0)), whole)
    assert whole.dtype == torch.float64


def test_levels_are_those_of_the_timesteps_that_the_network_is_told() -> None:
    of = sampler(SOLVERS["ddpm"], normal(1.0))
    assert DISCRETE.betas is not None
    abar = np.cumprod(1 - DISCRETE.betas)[plan_of(of).times.astype(int)]
    np.testing.assert_allclose(levels(of), np.stack([abar**0.5, (1 - abar) ** 0.5], axis=1), rtol=1e-12)
    one_based = sampler(AnalyticDDPM("analytic_ddpm", 8, variance="fixed_small", shift1=False), normal(1.0))
    zero_based = sampler(AnalyticDDPM("analytic_ddpm", 8, variance="fixed_small"), normal(1.0))
    assert levels(one_based) == levels(zero_based)


@pytest.mark.parametrize(("name", "t"), [("ddpm", 0), ("ddim", 8), ("heun", 3), ("euler", -1)])
def test_a_start_where_no_step_begins_is_refused(name: str, t: int) -> None:
    of = sampler(SOLVERS[name], normal(1.0))
    with pytest.raises(InputError, match=f"sampling can start .* not {t}"):
        late_start(of, Schedule.uniform(of.sampling.nfe, 1.0), t, torch.zeros(1, *SHAPE), torch.arange(1))


def test_solvers_that_start_at_their_beginning_only_are_named() -> None:
    of = sampler(LDM("ldm_ddim", 5), normal(1.0))
    with pytest.raises(InputError, match="ldm_ddim cannot start late; ddpm, ddim, euler, heun can"):
        late_start(of, Schedule.uniform(5, 1.0), 2, torch.zeros(1, *SHAPE), torch.arange(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "takes class labels"),
        ({"image_shape": (3, 8, 8)}, "works on latents"),
        ({"prior": lambda seed, ids: ids}, "other noise than normal"),
    ],
)
def test_networks_whose_training_cannot_be_repeated_are_refused(change: dict[str, Any], message: str) -> None:
    of = sampler(SOLVERS["euler"], normal(1.0))
    for key, value in change.items():
        setattr(of.model, key, value)
    with pytest.raises(InputError, match=message):
        plan_of(of)


def test_norms_that_are_not_finite_are_refused() -> None:
    norms = Norms(1, CPU)
    norms.add(0, torch.full((1, 1, 1, 1), float("nan")))
    with pytest.raises(NonFiniteError):
        _ = norms.means
