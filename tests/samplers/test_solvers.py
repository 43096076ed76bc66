"""The solvers on data whose exact denoiser is known: a Gaussian N(mean, spread) in every pixel."""

import inspect
import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo import lookup_backend

from samplers import solvers
from samplers.errors import InputError
from samplers.grids import Churn, DiscreteGrid, discrete_grid, sigma_grid, training_betas
from samplers.guidance import guided
from samplers.prediction import Predict, Prediction
from samplers.scaling import scaled
from samplers.schedule import Schedule
from samplers.solvers import change_of_variables, ddim, ddpm, edm


def gaussian(grid: DiscreteGrid, mean: float, spread: float) -> Predict:
    """The exact eps for N(mean, spread) data, with the v that gives the true variance of a step."""

    def predict(x: Tensor, t: int) -> Prediction:
        abar, beta, low = float(grid.abar[t]), float(grid.beta[t]), float(grid.posterior_variance[max(t, 1)])
        total = abar * spread + 1 - abar
        weight = beta * math.sqrt(float(grid.abar_prev[t])) / (1 - abar)
        true = float(grid.posterior_variance[t]) + weight**2 * spread * (1 - abar) / total
        part = (math.log(true) - math.log(low)) / (math.log(beta) - math.log(low))
        eps = math.sqrt(1 - abar) / total * (x - math.sqrt(abar) * mean)
        return Prediction(eps, torch.full_like(x, 2 * part - 1))

    return predict


def silent(t: int) -> Tensor:
    raise AssertionError(f"noise was asked for at evaluation {t}")


@settings(deadline=None, max_examples=25)
@given(mean=st.floats(-2, 2), spread=st.floats(0.05, 0.9), nfe=st.integers(2, 40))
def test_ancestral_sampling_of_gaussian_data_keeps_the_analytic_mean_and_variance(
    mean: float, spread: float, nfe: int
) -> None:
    grid = discrete_grid(training_betas("linear", 1000), str(nfe))
    # The chain is affine in the start and the draws: image 0 has all of them 0, image i only number i - 1.
    inputs = torch.eye(nfe, dtype=torch.float64)
    inputs = torch.cat([torch.zeros(1, nfe, dtype=torch.float64), inputs])[:, :, None, None, None]
    out = ddpm(
        gaussian(grid, mean, spread),
        inputs[:, nfe - 1],
        grid,
        lambda t: inputs[:, t - 1],
        variance="learned_range",
        clip=False,
    ).flatten()
    offset, weights = out[0], out[1:] - out[0]
    start, first = float(grid.abar[-1]), float(grid.abar[0])
    got_mean = offset + weights[-1] * math.sqrt(start) * mean
    got_variance = (weights[:-1] ** 2).sum() + weights[-1] ** 2 * (start * spread + 1 - start)
    assert float(got_mean) == pytest.approx(mean, rel=1e-8, abs=1e-8)
    # The last step returns E[x0 | x], whose variance lacks the part that stays unknown.
    assert float(got_variance) == pytest.approx(first * spread**2 / (first * spread + 1 - first), rel=1e-8)


@pytest.mark.parametrize(("variance", "bounds"), [("fixed_small", (0.0, 1.0)), ("fixed_large", (1.0, 9.0))])
def test_fixed_variances_bracket_the_true_one(variance: Any, bounds: tuple[float, float]) -> None:
    grid = discrete_grid(training_betas("linear", 1000), "10")
    predict = gaussian(grid, 0.0, 0.3)
    draws = torch.randn(10, 20000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    true = ddpm(predict, start, grid, lambda t: draws[t], variance="learned_range", clip=False).var()
    got = ddpm(predict, start, grid, lambda t: draws[t], variance=variance, clip=False).var()
    assert bounds[0] < float(got / true) < bounds[1]
    assert abs(float(got / true) - 1) > 0.05


@settings(deadline=None, max_examples=20)
@given(mean=st.floats(-1, 1), spread=st.floats(0.1, 1.5), start=st.floats(-2, 2))
def test_ddim_converges_to_the_closed_form_solution_of_the_ode(
    mean: float, spread: float, start: float
) -> None:
    betas = training_betas("linear", 4000)
    abar = np.cumprod(1 - betas)
    last = float(abar[-1])
    x = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
    # The marginals stay Gaussian and the flow is linear, so it keeps (x - its mean)/(its deviation).
    exact = mean + math.sqrt(spread) * (start - math.sqrt(last) * mean) / math.sqrt(last * spread + 1 - last)
    errors = []
    for nfe in (500, 1000):
        grid = discrete_grid(betas, str(nfe))
        errors.append(float((ddim(gaussian(grid, mean, spread), x, grid, silent, clip=False) - exact).abs()))
    size = abs(start - math.sqrt(last) * mean)
    assert errors[1] <= 0.01 * size + 1e-5
    assert errors[1] <= 0.65 * errors[0] + 1e-5


def denoiser(times: Any, mean: float, spread: float) -> Predict:
    def predict(x: Tensor, t: int) -> Prediction:
        sigma = float(times[t])
        return Prediction(sigma / (spread + sigma**2) * (x - mean))

    return predict


def edm_error(nfe: int, mean: float, spread: float, start: float, **options: Any) -> float:
    grid = sigma_grid(nfe, **options)
    x = torch.full((1, 1, 1, 1), start * grid.start, dtype=torch.float64)
    out = edm(change_of_variables(denoiser(grid.times, mean, spread), grid), x, grid, silent)
    level = float(grid.times[-1])
    exact = mean + math.sqrt(spread) * (start * level - mean) / math.sqrt(spread + level**2)
    return abs(float(out) - exact)


@settings(deadline=None, max_examples=20)
@given(mean=st.floats(-1, 1), spread=st.floats(0.1, 1.5), start=st.floats(0.2, 2))
def test_euler_converges_linearly_and_heun_quadratically(mean: float, spread: float, start: float) -> None:
    euler = [edm_error(n, mean, spread, start, method="euler") for n in (64, 128)]
    heun = [edm_error(2 * n - 1, mean, spread, start, method="heun") for n in (64, 128)]
    assert euler[1] <= 0.6 * euler[0] + 1e-9
    # Heun's last step is an Euler step from sigma_min = 0.002, which leaves an error of about sigma_min².
    assert heun[1] <= 0.3 * heun[0] + 3e-5
    assert heun[1] <= euler[1] + 3e-5


@pytest.mark.parametrize("schedule", ["linear", "vp", "ve"])
@pytest.mark.parametrize("scaling", ["none", "vp"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_every_form_of_the_ode_has_the_same_solution(schedule: Any, scaling: Any, alpha: float) -> None:
    options: dict[str, Any] = {"schedule": schedule, "scaling": scaling, "alpha": alpha}
    coarse, fine = (edm_error(nfe, 0.3, 0.4, 0.8, **options) for nfe in (255, 511))
    assert coarse < 5e-3
    assert fine < 0.5 * coarse + 1e-5


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("mixed", [False, True])
def test_general_alpha_equals_the_published_algorithm_on_denoised_images(alpha: float, mixed: bool) -> None:
    """Karras et al. 2022, algorithm 1 with alpha and churn, written out for the vp process."""
    steps, churn, lam = 9, Churn(amount=2.0, s_min=0.05, s_max=50.0, noise=1.003), 1.01
    low, high = math.log(0.002**2 + 1), math.log(80.0**2 + 1)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2

    def sigma(t: float) -> float:
        return math.sqrt(math.exp(beta_d * t * t / 2 + beta_min * t) - 1)

    def inverse(level: float) -> float:
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log(1 + level**2)) - beta_min) / beta_d

    def image(x: Tensor, level: float) -> Tensor:
        return 0.3 + 0.4 / (0.4 + level**2) * (x - 0.3) + 0.05 * torch.sin(2 * x)

    def slope(x: Tensor, t: float, divisor: float) -> Tensor:
        level = sigma(t)
        s = 1 / math.sqrt(1 + level**2)
        rise = (beta_min + beta_d * t) / 2 * (level + 1 / level)
        seen = image(x / s, level)
        whole = x if mixed else x / s
        seen = whole - (whole - seen) / divisor
        return (rise / level - level * rise * s**2) * x - rise * s / level * seen

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
    draws = torch.randn(steps, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    start = x
    times = [1 + i / (steps - 1) * (1e-3 - 1) for i in range(steps)] + [0.0]
    x = x * sigma(1.0) / math.sqrt(1 + sigma(1.0) ** 2)
    for i in range(steps):
        level = sigma(times[i])
        inside = churn.s_min <= level <= churn.s_max
        raised = level * (1 + churn.amount / steps) if inside else level
        hat = inverse(raised)
        ratio = math.sqrt(1 + level**2) / math.sqrt(1 + raised**2)
        spread = math.sqrt(max(raised**2 - level**2, 0.0)) / math.sqrt(1 + raised**2) * churn.noise
        x = ratio * x + spread * draws[i]
        h = times[i + 1] - hat
        first = slope(x, hat, lam)
        if i < steps - 1:
            second = slope(x + alpha * h * first, hat + alpha * h, 1.0)
            first = (1 - 1 / (2 * alpha)) * first + 1 / (2 * alpha) * second
        x = x + h * first

    grid = sigma_grid(
        2 * steps - 1, discretization="vp", schedule="vp", scaling="vp", sigma_min=0.002, sigma_max=80.0,
        alpha=alpha, churn=churn,
    )  # fmt: skip
    told = grid.times.tolist()

    def network(x: Tensor, t: int) -> Prediction:
        return Prediction((x - image(x, told[t])) / told[t])

    schedule = Schedule.uniform(grid.nfe, lam).first_stages()
    if mixed:
        predict = scaled(change_of_variables(network, grid), schedule)
    else:
        predict = change_of_variables(scaled(network, schedule), grid)
    got = edm(predict, grid.start * start, grid, lambda t: draws[steps - 1 - t // 2])
    torch.testing.assert_close(got, x, rtol=0, atol=1e-9)


def test_churned_sampling_of_gaussian_data_keeps_its_variance() -> None:
    grid = sigma_grid(255, churn=Churn(amount=40.0))
    generator = torch.Generator().manual_seed(0)

    def noise(t: int) -> Tensor:
        return torch.randn(4000, 1, 1, 1, generator=generator, dtype=torch.float64)

    out = edm(denoiser(grid.times, 0.5, 0.3), grid.start * noise(0), grid, noise)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(out.var()) == pytest.approx(0.3, rel=0.1)


def test_change_of_variables_without_scaling_is_the_prediction_itself() -> None:
    grid = sigma_grid(5)
    predict = denoiser(grid.times, 0.0, 1.0)
    assert change_of_variables(predict, grid) is predict


def test_change_of_variables_names_the_same_image() -> None:
    grid = sigma_grid(5, scaling="vp")
    predict = denoiser(grid.times, 0.2, 0.5)
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(5):
        s, sigma = float(grid.scale[t]), float(grid.times[t])
        inner = x / s - sigma * predict(x / s, t).eps
        outer = x - sigma * change_of_variables(predict, grid)(x, t).eps
        torch.testing.assert_close(outer, inner, rtol=1e-10, atol=1e-10)


def wavy(x: Tensor, t: int) -> Prediction:
    return Prediction(0.9 * x + 0.05 * torch.sin(3 * x + 0.1 * t), 0.5 * torch.sin(x))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "edm"])
def test_float32_state_equals_the_float64_one_to_a_hundred_thousandth(solver: str) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 3, 4, 4, generator=generator)
    draws = torch.randn(20, 2, 3, 4, 4, generator=generator)

    def sample(dtype: torch.dtype) -> Tensor:
        x = start.to(dtype)
        if solver == "edm":
            levels = sigma_grid(19, churn=Churn(amount=5.0))
            return edm(
                denoiser(levels.times, 0.1, 0.5), levels.start * x, levels, lambda t: draws[t].to(dtype)
            )
        grid = discrete_grid(training_betas("linear", 1000), "20")
        if solver == "ddim":
            return ddim(wavy, x, grid, lambda t: draws[t].to(dtype), eta=0.5)
        return ddpm(wavy, x, grid, lambda t: draws[t].to(dtype), variance="learned_range")

    single, double = sample(torch.float32), sample(torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "graphs"), [("ddpm", 3), ("ddim", 3), ("heun", 4), ("euler", 2)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_steps_are_compiled_for_all_evaluations_and_change_the_image_by_rounding(
    solver: str, graphs: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if backend == "inductor" and not (shutil.which("g++") and headers.exists()):
        pytest.skip("inductor needs a C++ compiler and Python's headers on a processor")
    compiled: list[str] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(graph.code)
        return lookup_backend(backend)(graph, inputs)

    def predict(x: Tensor, t: int) -> Prediction:
        """As a network answers: eps and v are halves of the channels of one channels_last tensor."""
        both = torch.cat(wavy(x, t), dim=1).contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]
        return Prediction(both[:, :3], both[:, 3:])

    generator = torch.Generator().manual_seed(3)
    start = torch.randn(5, 3, 4, 4, generator=generator)
    draws = torch.randn(19, 5, 3, 4, 4, generator=generator)

    def sample(nfe: int) -> Tensor:
        if solver == "heun" or solver == "euler":
            levels = sigma_grid(nfe, method=solver, churn=Churn(amount=5.0))
            return edm(predict, levels.start * start, levels, lambda t: draws[t])
        grid = discrete_grid(training_betas("linear", 1000), str(nfe))
        if solver == "ddim":
            return ddim(predict, start, grid, lambda t: draws[t], eta=0.5)
        return ddpm(predict, start, grid, lambda t: draws[t], variance="learned_range")

    plain = sample(19)
    torch.compiler.reset()
    for name in ("_ancestral_step", "_ddim_step", "_euler_step", "_corrected"):
        step = inspect.unwrap(getattr(solvers, name))
        monkeypatch.setattr(solvers, name, torch.compile(step, dynamic=True, backend=counting))
    torch.testing.assert_close(sample(19), plain, rtol=0, atol=2e-6 * float(plain.abs().max()))
    assert 0 < len(compiled) <= graphs
    known = len(compiled)
    for nfe in (17, 11, 5):
        sample(nfe)
    assert len(compiled) == known


def test_no_solver_reads_a_value_back_from_the_device() -> None:
    # A tensor on "meta" has no values: reading one (item, a comparison in an if) raises.
    x = torch.empty(2, 3, 4, 4, device="meta")
    grid = discrete_grid(training_betas("cosine", 1000), "10")
    levels = sigma_grid(9, scaling="vp", churn=Churn(amount=5.0))

    def noise(t: int) -> Tensor:
        return torch.empty_like(x)

    def gradient(x: Tensor, t: int) -> Tensor:
        return -x

    for variance in ("fixed_small", "fixed_large", "learned_range"):
        assert ddpm(wavy, x, grid, noise, variance=variance, gradient=gradient).shape == x.shape
    assert ddim(guided(wavy, gradient, grid), x, grid, noise, eta=1.0, clip=False).shape == x.shape
    assert edm(change_of_variables(wavy, levels), x, levels, noise).shape == x.shape


def test_solvers_ask_for_noise_once_per_step_by_its_first_evaluation_and_only_where_it_is_used() -> None:
    x = torch.zeros(1, 1, 2, 2)
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    grid = discrete_grid(training_betas("linear", 1000), "5")
    ddpm(wavy, x, grid, noise, variance="fixed_large")
    assert asked == [4, 3, 2, 1]
    asked.clear()
    ddim(wavy, x, grid, noise, eta=1.0)
    assert asked == [4, 3, 2, 1]
    asked.clear()
    edm(wavy, x, sigma_grid(7, churn=Churn(amount=1.0, s_max=50.0)), noise)
    assert asked == [4, 2, 0]


def test_clipping_bounds_the_image_and_only_where_it_is_asked() -> None:
    grid = discrete_grid(training_betas("linear", 1000), "5")
    x = torch.full((1, 1, 1, 1), 3.0)

    def zero(x: Tensor, t: int) -> Prediction:
        return Prediction(torch.zeros_like(x))

    assert float(ddim(zero, x, grid, silent)) == 1.0
    assert float(ddim(zero, x, grid, silent, clip=False)) == pytest.approx(
        3.0 / math.sqrt(float(grid.abar[-1]))
    )


@pytest.mark.parametrize("clip", [False, True])
def test_guidance_with_a_gradient_of_zero_is_plain_ddim(clip: bool) -> None:
    grid = discrete_grid(training_betas("linear", 1000), "10")
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = ddim(wavy, x, grid, silent, clip=clip)
    zero = guided(wavy, lambda x, t: torch.zeros_like(x), grid, clip=clip)
    torch.testing.assert_close(ddim(zero, x, grid, silent, clip=False), plain, rtol=0, atol=1e-9)


def test_ancestral_guidance_moves_the_mean_by_variance_times_gradient() -> None:
    grid = discrete_grid(training_betas("linear", 1000), "2")
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def zero(x: Tensor, t: int) -> Prediction:
        return Prediction(torch.zeros_like(x))

    seen: list[float] = []

    def record(x: Tensor, t: int) -> Prediction:
        seen.append(float(x))
        return zero(x, t)

    ddpm(record, x, grid, lambda t: x, variance="fixed_large", gradient=lambda x, t: torch.ones_like(x))
    assert seen[1] == pytest.approx(float(grid.beta[1]))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_zero_to_one_is_refused(eta: float) -> None:
    grid = discrete_grid(training_betas("linear", 1000), "5")
    with pytest.raises(InputError, match="eta"):
        ddim(wavy, torch.zeros(1, 1, 1, 1), grid, silent, eta=eta)


def test_unknown_variance_and_a_learned_one_without_v_are_refused() -> None:
    grid = discrete_grid(training_betas("linear", 1000), "5")
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(InputError, match="learned_sigma"):
        ddpm(wavy, x, grid, silent, variance="learned_sigma")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fixed_large"):
        ddpm(lambda x, t: Prediction(x), x, grid, silent, variance="learned_range")
