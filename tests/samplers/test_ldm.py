"""LDM's DDIM against the outputs of the official code, and on Gaussian data whose exact denoiser is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.errors import InputError
from samplers.ldm import LatentGrid, classifier_free, ddim, latent_betas, latent_grid
from samplers.prediction import Predict, Prediction
from samplers.scaling import scaled
from samplers.schedule import Schedule

BETAS = latent_betas(0.0015, 0.0195)
FAILING = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}


def toy(params: dict[str, Any], classes: Tensor) -> Callable[[Tensor, float], Prediction]:
    """The network of meta.json's formula, for the class of each image of the batch."""

    def network(x: Tensor, time: float) -> Prediction:
        u = time / params["tscale"]
        a = math.exp(-sum(c * u ** (n + 1) for n, c in enumerate(params["c"])))
        c, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in x.shape[1:]), indexing="ij")
        phase = 0.7 * i + 0.4 * j + 1.3 * c
        mu = (params["m"] * torch.sin(phase + 0.9 * classes.double()[:, None, None, None])).to(x.dtype)
        gain = math.sqrt(1 - a) / (a * params["s2"] + 1 - a)
        return Prediction(gain * (x - math.sqrt(a) * mu) + params["q"] * torch.sin(params["w"] * x + 5 * u))

    return network


def close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=tolerance, err_msg=what)


def test_ldm_ddim_reproduces_every_official_case(shared: Path) -> None:
    folder = shared / "reference" / "vectors" / "ldm"
    cases = 0
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        schedule = file["beta_schedule"]
        grid = latent_grid(
            latent_betas(schedule["linear_start"], schedule["linear_end"], schedule["timesteps"]), file["S"]
        )
        assert grid.timestep.tolist() == arrays["ddim_timesteps"].tolist()
        close(grid.abar, arrays["a_t"], 1e-7, name)
        close(grid.abar_prev, arrays["a_prev"], 1e-7, name)
        for label, case in file["cases"].items():
            close(case["eta"] * grid.spread, arrays[case["sigma_key"]], 1e-6, f"{name} {label} sigma")
            official_case(file, case, arrays, grid, f"{name} {label}")
            cases += 1
    assert cases > 0


def official_case(
    file: dict[str, Any], case: dict[str, Any], arrays: dict[str, Any], grid: LatentGrid, what: str
) -> None:
    told: list[float] = []
    states: list[Any] = []
    draws, start = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["x_T"])
    classes = torch.from_numpy(arrays["y"]) if file["conditional"] else torch.zeros(len(start))
    guidance = case.get("guidance", 1.0)
    if guidance != 1:
        classes = torch.cat([torch.zeros_like(classes), classes])
    network = toy(file["net_params"], classes)

    def predict(x: Tensor, t: int) -> Prediction:
        told.append(grid.times[t])
        states.append(x[:1].numpy().copy())
        return network(x, grid.times[t])

    net = predict if guidance == 1 else classifier_free(predict, guidance)
    out = ddim(
        scaled(net, Schedule.uniform(grid.nfe, case["lam"])),
        start,
        grid,
        lambda t: draws[grid.nfe - 1 - t],
        eta=case["eta"],
        temperature=case.get("temperature", 1.0),
    )
    assert out.dtype == torch.float32
    close(out, arrays[case["out_key"]], 1e-5, what)
    assert told == arrays["t_seen"].tolist()
    assert len(told) == case["network_calls"]
    if "xin_key" in case:
        close(np.stack(states), arrays[case["xin_key"]], 1e-5, f"{what} xin")


def gaussian(grid: LatentGrid, mean: float, spread: float) -> Predict:
    """The exact eps for latents N(mean, spread)."""

    def predict(x: Tensor, t: int) -> Prediction:
        abar = float(grid.abar[t])
        return Prediction(math.sqrt(1 - abar) / (abar * spread + 1 - abar) * (x - math.sqrt(abar) * mean))

    return predict


def silent(t: int) -> Tensor:
    raise AssertionError(f"noise was asked for at evaluation {t}")


@settings(deadline=None, max_examples=25)
@given(
    mean=st.floats(-3, 3), eta=st.floats(0, 1), steps=st.integers(1, 50).filter(lambda s: s not in FAILING)
)
def test_a_single_point_is_sampled_with_exactly_the_noise_of_timestep_zero_for_any_steps_and_eta(
    mean: float, eta: float, steps: int
) -> None:
    grid = latent_grid(BETAS, steps)
    # The chain is affine in start and draws: image 0 has all of them 0, image i only number i - 1.
    unit = (
        torch.eye(grid.nfe + 2, grid.nfe + 1, dtype=torch.float64).roll(1, 0).reshape(-1, grid.nfe + 1, 1, 1)
    )
    first, last = float(grid.abar[-1]), float(grid.abar_prev[0])
    start = math.sqrt(first) * mean + math.sqrt(1 - first) * unit[:, -1:]
    out = ddim(gaussian(grid, mean, 0.0), start, grid, lambda t: unit[:, t : t + 1], eta=eta).flatten()
    assert float(out[0]) == pytest.approx(math.sqrt(last) * mean, abs=1e-9)
    assert float((out[1:] - out[0]).square().sum()) == pytest.approx(1 - last, rel=1e-9)
    assert float(out[1] - out[0]) == pytest.approx(eta * float(grid.spread[0]), abs=1e-9)


def test_temperature_multiplies_the_noise_alone() -> None:
    grid = latent_grid(BETAS, 5)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def noise(t: int) -> Tensor:
        return torch.ones_like(x)

    def zero(x: Tensor, t: int) -> Prediction:
        return Prediction(torch.zeros_like(x))

    full = ddim(zero, x, grid, noise, eta=1.0)
    assert float(ddim(zero, x, grid, noise, eta=1.0, temperature=0.25)) == pytest.approx(0.25 * float(full))
    assert float(ddim(zero, x, grid, silent, eta=1.0, temperature=0.0)) == 0.0


def test_noise_is_asked_for_once_per_step_the_last_one_too() -> None:
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return torch.zeros(1, 1, 2, 2)

    grid = latent_grid(BETAS, 4)
    ddim(gaussian(grid, 0, 1), torch.zeros(1, 1, 2, 2), grid, noise, eta=0.5)
    assert asked == [3, 2, 1, 0]


def test_the_schedule_is_linear_in_the_square_root_of_beta() -> None:
    betas = latent_betas(0.0015, 0.0195, 1000)
    assert (betas[0], betas[-1]) == (pytest.approx(0.0015), pytest.approx(0.0195))
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.0195**0.5 - 0.0015**0.5) / 999, rtol=1e-9)


def test_exactly_the_steps_that_fail_in_the_official_code_are_refused() -> None:
    refused = set()
    for steps in range(1, 1001):
        try:
            grid = latent_grid(BETAS, steps)
        except InputError:
            refused.add(steps)
        else:
            assert grid.nfe == -(-1000 // (1000 // steps))
            assert grid.timestep[0] == 1
            assert grid.timestep[-1] <= 999
    assert refused == FAILING


def test_the_refusal_names_the_nearest_steps_that_work() -> None:
    with pytest.raises(InputError, match="near it 34, 35, 38, 39 work"):
        latent_grid(BETAS, 36)
    with pytest.raises(InputError, match="near it 499, 500 work"):
        latent_grid(BETAS, 1001)
    with pytest.raises(InputError, match="near it 1, 2 work"):
        latent_grid(BETAS, 0)


@pytest.mark.parametrize("end", [0.0, 1.0, -0.1, math.nan])
def test_schedules_outside_zero_to_one_are_refused(end: float) -> None:
    with pytest.raises(InputError, match="linear_end"):
        latent_betas(0.001, end)
    with pytest.raises(InputError, match="β"):
        latent_grid(np.full(1000, end), 10)
    with pytest.raises(InputError, match="timesteps"):
        latent_betas(0.001, 0.01, 1)


@pytest.mark.parametrize(
    ("key", "value"), [("eta", -0.1), ("eta", 1.1), ("temperature", -1.0), ("temperature", math.inf)]
)
def test_eta_and_temperature_out_of_range_are_refused(key: str, value: float) -> None:
    grid = latent_grid(BETAS, 5)
    with pytest.raises(InputError, match=key):
        ddim(gaussian(grid, 0, 1), torch.zeros(1, 1, 1, 1), grid, silent, **{key: value})


def doubled(x: Tensor, t: int) -> Prediction:
    """A network of two halves: 0.1·x without a condition, 0.1·x + 1 + t with one; v tells the half."""
    half = torch.arange(2).repeat_interleave(len(x) // 2).to(x)[:, None, None, None]
    return Prediction(0.1 * x + half * (1 + t), half.expand_as(x))


def test_guidance_extrapolates_from_the_first_half_to_the_second_in_one_call() -> None:
    calls: list[int] = []

    def network(x: Tensor, t: int) -> Prediction:
        calls.append(len(x))
        assert torch.equal(x[:3], x[3:])
        return doubled(x, t)

    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    eps, v = classifier_free(network, 2.5)(x, 3)
    torch.testing.assert_close(eps, 0.1 * x + 10)
    assert v is not None
    assert torch.equal(v, torch.ones_like(x))
    assert calls == [6]
    assert classifier_free(lambda x, t: Prediction(x), 2.5)(x, 3).v is None


def test_scaling_after_guidance_equals_scaling_both_halves_and_differs_from_scaling_one() -> None:
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = Schedule.linear(5, 0.01, 1.1)
    after = scaled(classifier_free(doubled, 3.0), schedule)(x, 2).eps
    before = classifier_free(scaled(doubled, schedule), 3.0)(x, 2).eps
    torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)
    assert torch.equal(after, classifier_free(doubled, 3.0)(x, 2).eps / 1.12)


def test_a_guidance_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="guidance"):
        classifier_free(doubled, math.nan)


def test_float32_state_equals_the_float64_one_to_a_hundred_thousandth() -> None:
    grid = latent_grid(BETAS, 20)
    generator = torch.Generator().manual_seed(3)
    start, draws = (
        torch.randn(2, 1, 4, 4, generator=generator),
        torch.randn(20, 2, 1, 4, 4, generator=generator),
    )
    single, double = (
        ddim(gaussian(grid, 0.1, 0.5), start.to(kind), grid, lambda t, k=kind: draws[t].to(k), eta=0.7)
        for kind in (torch.float32, torch.float64)
    )
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_the_solver_reads_no_value_back_from_the_device() -> None:
    # A tensor on "meta" has no values: reading one raises.
    x = torch.empty(2, 3, 4, 4, device="meta")
    grid = latent_grid(BETAS, 10)
    predict = classifier_free(gaussian(grid, 0.1, 0.5), 3.0)
    assert ddim(predict, x, grid, lambda t: torch.empty_like(x), eta=1.0).shape == x.shape
