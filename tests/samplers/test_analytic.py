"""Analytic-DPM against the outputs of the official code, and on Gaussian data, for which its variance is exact."""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.analytic import (
    AnalyticGrid,
    MsEpsSource,
    Statistics,
    analytic_grid,
    cached_ms_eps,
    clipped,
    ddim,
    ddim_variance,
    ddpm,
    ddpm_variance,
    estimate_ms_eps,
    read_ms_eps,
    save_ms_eps,
)
from samplers.errors import InputError, NonFiniteError
from samplers.grids import training_betas
from samplers.prediction import Predict, Prediction
from samplers.scaling import scaled
from samplers.schedule import Schedule

BETAS = training_betas("linear", 1000)
SOURCE = MsEpsSource(model="ab12", data="cd34", images=10, seed=0, shift1=True)


# --- official vectors ---------------------------------------------------------------------------------------


def toy(params: dict[str, Any]) -> Callable[[Tensor, float], Prediction]:
    """The network of meta.json's formula."""

    def network(x: Tensor, time: float) -> Prediction:
        u = time / params["tscale"]
        if params["abar"] == "poly":
            a = math.exp(-sum(c * u ** (n + 1) for n, c in enumerate(params["c"])))
        else:
            a = math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        c, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in x.shape[1:]), indexing="ij")
        mu = (params["m"] * torch.sin(0.7 * i + 0.4 * j + 1.3 * c)).to(x.dtype)
        gain = math.sqrt(1 - a) / (a * params["s2"] + 1 - a)
        return Prediction(gain * (x - math.sqrt(a) * mu) + params["q"] * torch.sin(params["w"] * x + 5 * u))

    return network


def close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=tolerance, err_msg=what)


def test_every_official_case_is_reproduced(shared: Path) -> None:
    folder = shared / "reference" / "vectors" / "analytic_dpm"
    cases = 0
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        betas = training_betas(file["beta_schedule"], file["N"])
        close(np.append(0, betas), arrays["betas"], 1e-12, name)
        for label, case in file["cases"].items():
            official_case(file, case, betas, arrays, f"{name} {label}")
            cases += 1
    assert cases > 0


def official_case(
    file: dict[str, Any], case: dict[str, Any], betas: Any, arrays: dict[str, Any], what: str
) -> None:
    asked = case["settings"]
    grid = analytic_grid(
        betas,
        case["sample_steps"],
        spacing=asked.get("steps_type", "linear"),
        shift1=asked.get("shift1", False),
    )
    steps = arrays.get(case["out_key"].replace("out/", "steps/"), arrays["steps"])
    assert grid.level[::-1].tolist() == steps.tolist()
    eta = asked.get("eta")
    naive = case["function"].endswith("naive")
    ms_eps = None if naive else arrays["ms_eps"]
    if eta is None:
        kind = "analytic" if not naive else "fixed_small" if asked["small_sigma"] else "fixed_large"
        variance = ddpm_variance(grid, kind, ms_eps)  # type: ignore[arg-type]
    else:
        variance = ddim_variance(grid, eta, ms_eps)
    if "clip_sigma_idx" in asked:
        variance = clipped(
            variance, grid, clip_sigma_idx=asked["clip_sigma_idx"], clip_pixel=asked["clip_pixel"]
        )
    close(variance[:0:-1], arrays[case["sigma2_key"]][:-1], 1e-7, f"{what} sigma2")

    told = grid.times
    if asked["rescale_timesteps"]:
        told = (told.astype(np.float32) * np.float32(1000) / np.float32(file["N"])).astype(np.float64)
    network = toy(file["net_params"])
    seen: list[float] = []
    states: list[Any] = []

    def predict(x: Tensor, t: int) -> Prediction:
        seen.append(told[t])
        states.append(x[:1].numpy().copy())
        return network(x, told[t])

    net = scaled(predict, Schedule.uniform(grid.nfe, case["lam"]))
    draws, start = torch.from_numpy(arrays["z"]), torch.from_numpy(arrays["x_T"])

    def noise(t: int) -> Tensor:
        return draws[grid.nfe - 1 - t]

    if eta is None:
        clip = asked.get("clip_denoise", True)
        out = ddpm(net, start, grid, noise, variance=variance, clip=clip)
    else:
        out = ddim(net, start, grid, noise, variance=variance, eta=eta)
    assert out.dtype == torch.float32
    tolerance = max(10 * case["replay_max_abs_diff_float64"], 1e-5)
    close(out, arrays[case["out_key"]], tolerance, what)
    assert seen == arrays[case["t_seen_key"]].tolist()
    if "xin_key" in case:
        close(np.stack(states), arrays[case["xin_key"]], tolerance, f"{what} xin")


def test_the_official_statistics_file_is_read(shared: Path) -> None:
    folder = shared / "reference" / "vectors" / "analytic_dpm"
    with np.load(folder / "linear_20.npz") as archive:
        expected = archive["ms_eps"]
    ms_eps = read_ms_eps(folder / "linear_1000.ms_eps.pth", 1000)
    assert ms_eps.dtype == np.float32
    assert np.array_equal(ms_eps, expected)


# --- Gaussian data ------------------------------------------------------------------------------------------


def gaussian(grid: AnalyticGrid, mean: float, spread: float) -> Predict:
    """The exact eps for images N(mean, spread)."""

    def predict(x: Tensor, t: int) -> Prediction:
        abar = float(grid.abar[t])
        return Prediction(math.sqrt(1 - abar) / (abar * spread + 1 - abar) * (x - math.sqrt(abar) * mean))

    return predict


def exact_ms_eps(betas: Any, spread: float, dtype: Any = np.float32) -> Statistics:
    """E[eps(x_n, n)²] = (1 - abar)/(abar·spread + 1 - abar) for images of that variance."""
    abar = np.cumprod(1 - betas)
    return np.append(0, (1 - abar) / (abar * spread + 1 - abar)).astype(dtype)


def silent(t: int) -> Tensor:
    raise AssertionError(f"noise was asked for at evaluation {t}")


def moments(run: Callable[[Tensor, Callable[[int], Tensor]], Tensor], nfe: int) -> tuple[float, float]:
    """Mean and variance of a sampler that is affine in its start and its draws."""
    # Image 0 has all of them 0, image i only number i - 1.
    unit = torch.eye(nfe + 2, nfe + 1, dtype=torch.float64).roll(1, 0).reshape(-1, nfe + 1, 1, 1)
    out = run(unit[:, -1:], lambda t: unit[:, t : t + 1]).flatten()
    return float(out[0]), float((out[1:] - out[0]).square().sum())


@settings(deadline=None, max_examples=25)
@given(
    mean=st.floats(-0.3, 0.3),
    deviation=st.floats(0.1, 0.3),
    nfe=st.integers(2, 12),
    eta=st.none() | st.floats(0, 1),
    spacing=st.sampled_from(["cosine", "linear"]),
)
def test_the_analytic_variance_samples_gaussian_data_exactly_in_any_number_of_steps(
    mean: float, deviation: float, nfe: int, eta: float | None, spacing: str
) -> None:
    betas = training_betas(spacing, 1000)
    grid = analytic_grid(betas, nfe, shift1=True)
    predict = gaussian(grid, mean, deviation**2)
    # float64, because 1 - Γ of the noisiest levels is smaller than float32 can tell from 0.
    ms_eps = exact_ms_eps(betas, deviation**2, np.float64)

    def run(x: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        if eta is None:
            return ddpm(predict, x, grid, noise, variance=ddpm_variance(grid, "analytic", ms_eps))
        return ddim(predict, x, grid, noise, variance=ddim_variance(grid, eta, ms_eps), eta=eta)

    got_mean, got_variance = moments(run, nfe)
    # What is returned is E[x0 | x_1]; its variance is that of x0 less what is left to know at level 1.
    abar = 1 - betas[0]
    known = abar * deviation**2 / (abar * deviation**2 + 1 - abar)
    assert got_mean == pytest.approx(mean, abs=0.01)  # the true x_N is not quite standard normal
    assert got_variance == pytest.approx(deviation**2 * known, rel=1e-3)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_in_few_steps_the_fixed_variances_miss_what_the_analytic_one_hits(kind: Any) -> None:
    grid = analytic_grid(BETAS, 5, shift1=True)
    predict = gaussian(grid, 0.1, 0.09)
    variance = ddpm_variance(grid, kind)
    _, got = moments(lambda x, noise: ddpm(predict, x, grid, noise, variance=variance, clip=False), 5)
    assert abs(got / 0.09 - 1) > 0.05


def test_without_statistics_the_variances_are_those_of_ddpm_and_ddim() -> None:
    grid = analytic_grid(BETAS, 10, shift1=True)
    small = (1 - grid.abar / grid.abar_prev) * (1 - grid.abar_prev) / (1 - grid.abar)
    np.testing.assert_allclose(ddpm_variance(grid, "fixed_small"), small, atol=1e-15)
    np.testing.assert_allclose(ddim_variance(grid, 0.5), small / 4, atol=1e-15)
    large = ddpm_variance(grid, "fixed_large")
    np.testing.assert_allclose(large[1:], 1 - grid.abar[1:] / grid.abar[:-1], atol=1e-15)
    assert large[0] == 0


def test_deterministic_ddim_becomes_stochastic_with_statistics() -> None:
    grid = analytic_grid(BETAS, 10, shift1=True)
    x = torch.zeros(1, 1, 2, 2)
    ddim(gaussian(grid, 0, 0.1), x, grid, silent, variance=ddim_variance(grid, 0.0))
    assert (ddim_variance(grid, 0.0, exact_ms_eps(BETAS, 0.1))[1:] > 0).all()


def test_statistics_beyond_what_images_allow_are_clipped_at_both_ends() -> None:
    grid = analytic_grid(BETAS, 10, shift1=True)
    beyond = ddpm_variance(grid, "analytic", np.full(1001, 1.5, np.float32))
    np.testing.assert_array_equal(beyond, ddpm_variance(grid, "fixed_small"))
    # At the noisiest level (1 - abar)/abar is 2.5e4; x0 in [-1, 1] has a variance of at most 1.
    weight = math.sqrt(grid.abar_prev[-1]) * grid.beta[-1] / (1 - grid.abar[-1])
    most = ddpm_variance(grid, "analytic", np.zeros(1001, np.float32))[-1]
    assert most == pytest.approx(grid.posterior_variance[-1] + weight**2)


# --- grid and clipping --------------------------------------------------------------------------------------


def test_linear_spacing_starts_at_n_ends_at_one_and_takes_the_running_sum() -> None:
    for nfe in (2, 3, 20, 31, 59, 1000):
        level = analytic_grid(BETAS, nfe, shift1=True).level
        assert (level[0], level[-1], level.size) == (1, 1000, nfe)
        assert (np.diff(level) > 0).all()
    assert analytic_grid(BETAS, 3, shift1=True).level.tolist() == [1, 500, 1000]  # 500.5 goes to even
    # 1 + 15·999/30 is 500.5 too, but the sum of strides has gone a rounding error beyond or below it.
    position = 1.0
    for _ in range(15):
        position += 999 / 30
    assert position != 500.5
    assert analytic_grid(BETAS, 31, shift1=True).level[15] == (501 if position > 500.5 else 500)


def test_quadratic_spacing_starts_below_n_and_may_repeat_the_first_level() -> None:
    grid = analytic_grid(BETAS, 5, spacing="quad_ddim", shift1=True)
    assert grid.level.tolist() == [1, 51, 201, 451, 801]
    repeated = analytic_grid(BETAS, 50, spacing="quad_ddim", shift1=True)
    assert repeated.level[:3].tolist() == [1, 1, 2]
    assert ddim_variance(repeated, 1.0)[1] == 0
    out = ddim(
        gaussian(repeated, 0.1, 0.1),
        torch.ones(1, 1, 1, 1),
        repeated,
        lambda t: torch.zeros(1, 1, 1, 1),
        variance=ddim_variance(repeated, 1.0),
        eta=1.0,
    )
    assert torch.isfinite(out).all()


def test_the_network_is_told_n_or_with_shift1_one_less() -> None:
    assert analytic_grid(BETAS, 3, shift1=False).times.tolist() == [1, 500, 1000]
    assert analytic_grid(BETAS, 3, shift1=True).times.tolist() == [0, 499, 999]


def test_the_variance_is_clipped_in_the_last_noisy_steps_only() -> None:
    grid = analytic_grid(BETAS, 5, shift1=True)
    variance = ddpm_variance(grid, "fixed_large")
    most = (2 * 2 / 255) ** 2 * math.pi / 2
    assert np.array_equal(clipped(variance, grid, clip_sigma_idx=0, clip_pixel=2), variance)
    assert clipped(variance, grid, clip_sigma_idx=1, clip_pixel=2) == pytest.approx([0, most, *variance[2:]])
    assert clipped(variance, grid, clip_sigma_idx=3, clip_pixel=2) == pytest.approx(
        [0, most, most, most, variance[4]]
    )
    assert np.array_equal(clipped(variance, grid, clip_sigma_idx=4, clip_pixel=1e3), variance)


def test_what_does_not_fit_is_refused_with_the_key_that_is_wrong() -> None:
    grid = analytic_grid(BETAS, 5, shift1=True)
    variance = ddpm_variance(grid, "fixed_small")
    x = torch.zeros(1, 1, 1, 1)
    for nfe in (1, 1001):
        with pytest.raises(InputError, match="2 to 1000 steps"):
            analytic_grid(BETAS, nfe, shift1=True)
    with pytest.raises(InputError, match="spacing"):
        analytic_grid(BETAS, 5, spacing="quad", shift1=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="β"):
        analytic_grid(np.append(0.0, BETAS), 5, shift1=True)
    with pytest.raises(InputError, match="variance"):
        ddpm_variance(grid, "learned_range")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="estimate it"):
        ddpm_variance(grid, "analytic")
    with pytest.raises(InputError, match=r"\[1001\]"):
        ddim_variance(grid, 0.0, np.ones(1000, np.float32))
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="eta"):
            ddim_variance(grid, eta)
        with pytest.raises(InputError, match="eta"):
            ddim(gaussian(grid, 0, 1), x, grid, silent, variance=variance, eta=eta)
    for index in (-1, 5):
        with pytest.raises(InputError, match="clip_sigma_idx"):
            clipped(variance, grid, clip_sigma_idx=index, clip_pixel=2)
    for pixel in (-1.0, math.inf):
        with pytest.raises(InputError, match="clip_pixel"):
            clipped(variance, grid, clip_sigma_idx=1, clip_pixel=pixel)


# --- solvers ------------------------------------------------------------------------------------------------


def test_noise_is_asked_for_once_per_step_but_the_last() -> None:
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return torch.zeros(1, 1, 1, 1)

    grid = analytic_grid(BETAS, 4, shift1=True)
    x = torch.zeros(1, 1, 1, 1)
    ddpm(gaussian(grid, 0, 0.1), x, grid, noise, variance=ddpm_variance(grid, "fixed_large"))
    ddim(gaussian(grid, 0, 0.1), x, grid, noise, variance=ddim_variance(grid, 1.0), eta=1.0)
    assert asked == [3, 2, 1, 3, 2, 1]


def test_ddim_clamps_the_image_but_not_the_direction() -> None:
    grid = analytic_grid(BETAS, 2, shift1=True)
    states: list[float] = []

    def predict(x: Tensor, t: int) -> Prediction:
        states.append(float(x))
        return Prediction(0.5 * x)

    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    out = ddim(predict, x, grid, silent, variance=np.zeros(2))
    assert states[1] == pytest.approx(math.sqrt(grid.abar[0]) + math.sqrt(1 - grid.abar[0]) * 1.0)
    assert float(out) == pytest.approx(min(1.0, (1 - 0.5 * math.sqrt(1 - grid.abar[0])) * states[1]))
    zero = ddpm(lambda x, t: Prediction(0 * x), x, grid, silent, variance=np.zeros(2), clip=False)
    assert float(zero) > 1


def test_float32_state_equals_the_float64_one_to_a_hundred_thousandth() -> None:
    grid = analytic_grid(BETAS, 20, shift1=True)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 1, 4, 4, generator=generator)
    draws = torch.randn(20, 2, 1, 4, 4, generator=generator)
    ms_eps = exact_ms_eps(BETAS, 0.1)

    def sample(kind: torch.dtype, eta: float | None) -> Tensor:
        predict, x = gaussian(grid, 0.1, 0.1), start.to(kind)

        def noise(t: int) -> Tensor:
            return draws[t].to(kind)

        if eta is None:
            return ddpm(predict, x, grid, noise, variance=ddpm_variance(grid, "analytic", ms_eps))
        return ddim(predict, x, grid, noise, variance=ddim_variance(grid, eta, ms_eps), eta=eta)

    for eta in (None, 0.5):
        single, double = sample(torch.float32, eta), sample(torch.float64, eta)
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_no_solver_reads_a_value_back_from_the_device() -> None:
    # A tensor on "meta" has no values: reading one raises.
    x = torch.empty(2, 3, 4, 4, device="meta")
    grid = analytic_grid(BETAS, 10, shift1=True)
    ms_eps, predict = exact_ms_eps(BETAS, 0.1), gaussian(grid, 0.1, 0.1)

    def noise(t: int) -> Tensor:
        return torch.empty_like(x)

    assert ddpm(predict, x, grid, noise, variance=ddpm_variance(grid, "analytic", ms_eps)).shape == x.shape
    assert ddim(predict, x, grid, noise, variance=ddim_variance(grid, 0.0, ms_eps)).shape == x.shape


# --- statistics ---------------------------------------------------------------------------------------------

FEW = training_betas("linear", 40)


def denoiser(betas: Any, mean: float, spread: float) -> Callable[[Tensor, int], Tensor]:
    abar = np.append(1.0, np.cumprod(1 - betas)).tolist()

    def predict(x: Tensor, n: int) -> Tensor:
        gain = math.sqrt(1 - abar[n]) / (abar[n] * spread + 1 - abar[n])
        return gain * (x - math.sqrt(abar[n]) * mean)

    return predict


def images(count: int, batch: int) -> Iterator[Tensor]:
    """Images N(0.2, 0.09) of 1×8×8, the same ones whatever the batch."""
    generator = torch.Generator().manual_seed(1)
    return iter((0.2 + 0.3 * torch.randn(count, 1, 8, 8, generator=generator)).split(batch))


def test_the_estimate_for_gaussian_data_is_the_known_mean_square_at_every_level() -> None:
    ms_eps = estimate_ms_eps(denoiser(FEW, 0.2, 0.09), images(300, 100), FEW, seed=0, count=300)
    assert (ms_eps.dtype, ms_eps.shape, ms_eps[0]) == (np.float32, (41,), 0)
    # 300·64 squares of a standard normal: their mean is known to 1 %.
    np.testing.assert_allclose(ms_eps[1:], exact_ms_eps(FEW, 0.09)[1:], rtol=0.05)


def test_the_estimate_does_not_depend_on_the_batches_but_on_the_seed() -> None:
    predict = denoiser(FEW, 0.2, 0.09)
    whole = estimate_ms_eps(predict, images(12, 12), FEW, seed=0, count=12)
    parts = estimate_ms_eps(predict, images(12, 5), FEW, seed=0, count=12)
    other = estimate_ms_eps(predict, images(12, 12), FEW, seed=1, count=12)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert (np.abs(other[1:] / whole[1:] - 1) > 1e-6).all()


def test_every_image_and_level_has_noise_of_its_own() -> None:
    betas = training_betas("linear", 30)
    spread = np.sqrt(1 - np.cumprod(1 - betas))
    noises: list[Tensor] = []

    def predict(x: Tensor, n: int) -> Tensor:
        noises.append(x / spread[n - 1])
        return x

    estimate_ms_eps(predict, [torch.zeros(3, 1, 4, 4)], betas, seed=0, count=3)
    drawn = torch.cat(noises).flatten(1)
    assert len(torch.unique(drawn.round(decimals=2), dim=0)) == len(drawn) == 90
    assert float(drawn.var()) == pytest.approx(1, abs=0.15)


def test_progress_counts_evaluations_and_ends_at_the_total() -> None:
    calls: list[tuple[int, int]] = []
    predict = denoiser(FEW, 0.2, 0.09)
    estimate_ms_eps(
        predict, images(5, 3), FEW, seed=0, count=5, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[0] == (3, 200)
    assert calls[-1] == (200, 200)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_estimate_of_too_few_images_or_of_a_broken_network_is_refused() -> None:
    with pytest.raises(InputError, match="there are 5"):
        estimate_ms_eps(denoiser(FEW, 0, 1), images(5, 3), FEW, seed=0, count=6)
    with pytest.raises(InputError, match="there are 0"):
        estimate_ms_eps(denoiser(FEW, 0, 1), [], FEW, seed=0, count=6)
    with pytest.raises(NonFiniteError, match="level 7 "):
        estimate_ms_eps(lambda x, n: x * math.nan if n >= 7 else x, images(2, 2), FEW, seed=0, count=2)


def test_saved_statistics_are_read_back(tmp_path: Path) -> None:
    ms_eps = exact_ms_eps(FEW, 0.1)
    save_ms_eps(tmp_path / "new" / "a.npz", ms_eps, SOURCE)
    assert np.array_equal(read_ms_eps(tmp_path / "new" / "a.npz", 40), ms_eps)
    assert os.listdir(tmp_path / "new") == ["a.npz"]


def test_statistics_are_computed_once_for_a_source_and_anew_for_another_or_a_damaged_file(
    tmp_path: Path,
) -> None:
    made: list[int] = []

    def estimate() -> Statistics:
        made.append(1)
        return exact_ms_eps(FEW, 0.1)

    file = cached_ms_eps(tmp_path, SOURCE, 40, estimate)
    assert cached_ms_eps(tmp_path, SOURCE, 40, estimate) == file
    assert len(made) == 1
    others = [
        MsEpsSource(**{**{k: getattr(SOURCE, k) for k in SOURCE.__slots__}, key: value})
        for key, value in {"model": "x", "data": "x", "images": 11, "seed": 1, "shift1": False}.items()
    ]
    assert len({cached_ms_eps(tmp_path, other, 40, estimate) for other in others} | {file}) == 6
    file.write_bytes(file.read_bytes()[:100])
    assert cached_ms_eps(tmp_path, SOURCE, 40, estimate) == file
    assert np.array_equal(read_ms_eps(file, 40), exact_ms_eps(FEW, 0.1))
    assert len(made) == 7


def test_statistics_that_cannot_be_written_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/a.npz cannot be written"):
        save_ms_eps(tmp_path / "file" / "a.npz", exact_ms_eps(FEW, 0.1), SOURCE)


def test_a_bare_array_in_a_torch_file_is_read_whatever_numpy_wrote_it(tmp_path: Path) -> None:
    ms_eps = exact_ms_eps(FEW, 0.1)
    for array in (ms_eps, ms_eps.astype(np.float64)):
        torch.save(array, tmp_path / "new.pth")
        assert np.array_equal(read_ms_eps(tmp_path / "new.pth", 40), ms_eps)
        torch.save(array, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
        assert np.array_equal(read_ms_eps(tmp_path / "legacy.pth", 40), ms_eps)


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused_and_does_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    inside = np.empty(41, dtype=object)
    inside[:] = [_Attack(target)] * 41
    for number, content in enumerate((_Attack(target), {"ms_eps": _Attack(target)}, inside)):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        with pytest.raises(InputError, match=r"asks for \S*(mkdir|ObjectDType). Nothing of it was run"):
            read_ms_eps(file, 40)
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match="plain.pth"):
            read_ms_eps(tmp_path / "plain.pth", 40)
    np.savez(tmp_path / "object.npz", ms_eps=inside)
    with pytest.raises(InputError, match="object.npz is damaged"):
        read_ms_eps(tmp_path / "object.npz", 40)
    assert not target.exists()


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "zeros.npz", ms_eps=np.zeros(1 << 23, np.float32))
    with pytest.raises(InputError, match=r"zeros\.npz: ms_eps has more bytes than the 16777216 allowed"):
        read_ms_eps(tmp_path / "zeros.npz", 40)
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
    with pytest.raises(InputError, match=r"deep\.pth has a dictionary key of type tuple"):
        read_ms_eps(tmp_path / "deep.pth", 40)


def test_files_that_hold_something_else_are_refused_by_name(tmp_path: Path) -> None:
    good = exact_ms_eps(FEW, 0.1)
    for number, (content, reason) in enumerate(
        (
            (torch.zeros(41), "holds a Tensor"),
            (good[1:], r"float32 \[40\]"),
            (np.zeros(41, np.int64), "asks for numpy.dtypes.Int64DType"),
            (np.full(41, np.nan), "NaN"),
            (-good, "negative"),
            (np.full(41, 1e300), "infinite"),
        )
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        with pytest.raises(InputError, match=reason) as caught:
            read_ms_eps(file, 40)
        assert file.name in str(caught.value)
    np.savez(tmp_path / "mu.npz", mu=good)
    (tmp_path / "text.pth").write_text("hello")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    for name in ("mu.npz", "text.pth", "empty.npz", "absent.npz", "absent.pth"):
        with pytest.raises(InputError, match=name):
            read_ms_eps(tmp_path / name, 40)
