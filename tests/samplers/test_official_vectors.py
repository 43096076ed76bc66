"""The solvers against the outputs of the official ADM-ES and EDM-ES code, for every reference vector.

The toy networks are analytic; their formulas are in each meta.json.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplers.grids import Churn, DiscreteGrid, SigmaGrid, discrete_grid, sigma_grid, training_betas
from samplers.guidance import guided
from samplers.prediction import Predict, Prediction, to_epsilon
from samplers.scaling import scaled
from samplers.schedule import Schedule
from samplers.solvers import change_of_variables, ddim, ddpm, edm

Arrays = dict[str, NDArray[Any]]


@dataclass
class Seen:
    """What a network was given: the time it was told and the first image of the batch, per call."""

    times: list[float] = field(default_factory=list)
    states: list[NDArray[Any]] = field(default_factory=list)

    def of(self, network: Callable[[Tensor, float], Prediction], times: list[float]) -> Predict:
        def predict(x: Tensor, t: int) -> Prediction:
            self.times.append(times[t])
            self.states.append(x[:1].numpy().copy())
            return network(x, times[t])

        return predict


@dataclass
class Findings:
    """Differences that exceed their tolerance, the number of cases, and the worst difference/tolerance."""

    wrong: list[str] = field(default_factory=list)
    cases: int = 0
    worst: float = 0.0

    def check(self, what: str, got: Any, expected: Any, tolerance: float) -> None:
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.shape == expected.shape, (what, got.shape, expected.shape)
        difference = float(np.max(np.abs(got - expected), initial=0.0))
        self.worst = max(self.worst, difference / tolerance)
        if not difference <= tolerance:
            self.wrong.append(f"{what}: {difference:.3g} > {tolerance:.3g}")


def pattern(params: dict[str, Any], x: Tensor, classes: Tensor | None) -> Tensor:
    c, i, j = (torch.arange(n, dtype=torch.float64) for n in x.shape[1:])
    phase = 0.7 * i[None, :, None] + 0.4 * j[None, None, :] + 1.3 * c[:, None, None]
    y = torch.zeros(1) if classes is None else classes
    amplitude = float(params["m"])
    return (amplitude * torch.sin(phase[None] + 0.9 * y.double()[:, None, None, None])).to(x.dtype)


def toy_eps(params: dict[str, Any], classes: Tensor | None) -> Callable[[Tensor, float], Prediction]:
    def network(x: Tensor, time: float) -> Prediction:
        u = time / params["tscale"]
        if params["abar"] == "poly":
            a = math.exp(-sum(c * u ** (n + 1) for n, c in enumerate(params["c"])))
        else:
            a = math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        gain = math.sqrt(1 - a) / (a * params["s2"] + 1 - a)
        bent = params["q"] * torch.sin(params["w"] * x + 5 * u)
        eps = gain * (x - math.sqrt(a) * pattern(params, x, classes)) + bent
        return Prediction(eps, params["vamp"] * torch.sin(2 * x + 4 * u))

    return network


def toy_gradient(
    params: dict[str, Any], times: list[float], classes: Tensor
) -> Callable[[Tensor, int], Tensor]:
    def gradient(x: Tensor, t: int) -> Tensor:
        strength = float(params["kappa"] * (1 + times[t] / params["tscale"]))
        return strength * (1.5 * pattern(params, x, classes) - x)

    return gradient


def toy_denoiser(params: dict[str, Any], classes: Tensor | None) -> Callable[[Tensor, float], Prediction]:
    def network(x: Tensor, sigma: float) -> Prediction:
        mu = pattern(params, x, classes)
        g = params["s2"] / (params["s2"] + sigma**2)
        bent = params["q"] * (1 - g) * torch.sin(params["w"] * x / math.sqrt(1 + sigma**2))
        return Prediction(to_epsilon("x0", mu + g * (x - mu) + bent, x, 1.0, sigma))

    return network


def adm_schedule(lam: Any, nfe: int) -> Schedule:
    if isinstance(lam, dict):
        return Schedule.constrained(nfe, lam["mean"], lam["k"])
    return Schedule.uniform(nfe, lam)


def adm_case(
    sampler: str, file: dict[str, Any], case: dict[str, Any], arrays: Arrays, grid: DiscreteGrid, seen: Seen
) -> Tensor:
    times = grid.times
    if file["rescale_timesteps"]:
        times = (times.astype(np.float32) * np.float32(1000 / file["diffusion_steps"])).astype(np.float64)
    told = times.tolist()
    classes = torch.from_numpy(arrays["y"]) if "y" in arrays else None
    sees_class = case.get("model_cond", file["class_conditional"])
    network = seen.of(toy_eps(file["net_params"], classes if sees_class else None), told)
    schedule = adm_schedule(case["lam"], grid.nfe)
    assert schedule.lambdas[0] == pytest.approx(case["lambda_by_index"][0], rel=1e-14)
    assert schedule.lambdas[-1] == pytest.approx(case["lambda_by_index"][-1], rel=1e-14)
    predict = scaled(network, schedule)
    gradient = None
    if file["classifier_guided"]:
        assert classes is not None
        gradient = toy_gradient(file["net_params"], told, classes)
    draws = torch.from_numpy(arrays["z"])
    x = torch.from_numpy(arrays["x_T"])

    def noise(t: int) -> Tensor:
        return draws[grid.nfe - 1 - t]

    if sampler == "adm_ddpm":
        return ddpm(predict, x, grid, noise, variance=case["var"], clip=case["clip"], gradient=gradient)
    if gradient is None:
        return ddim(predict, x, grid, noise, eta=case["eta"], clip=case["clip"])
    once = guided(predict, gradient, grid, clip=case["clip"])
    return ddim(scaled(once, schedule), x, grid, noise, eta=case["eta"], clip=False)


@pytest.mark.parametrize("folder", ["adm_ddpm", "adm_ddim"])
def test_adm_samplers_reproduce_every_official_case(shared: Path, folder: str) -> None:
    findings = adm_findings(shared / "reference" / "vectors" / folder)
    assert findings.cases > 0
    assert findings.wrong == []


def adm_findings(folder: Path) -> Findings:
    meta = json.loads((folder / "meta.json").read_text())
    findings = Findings()
    for name, file in meta["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        grid = discrete_grid(
            training_betas(file["noise_schedule"], file["diffusion_steps"]), file["timestep_respacing"]
        )
        findings.check(f"{name} timesteps", grid.timestep, arrays["timestep_map"], 0.1)
        findings.check(f"{name} betas", grid.beta, arrays["betas"], 1e-12)
        findings.check(f"{name} abar", grid.abar, arrays["alphas_cumprod"], 1e-12)
        for label, case in file["cases"].items():
            seen = Seen()
            out = adm_case(folder.name, file, case, arrays, grid, seen)
            assert out.dtype == torch.float32
            tolerance = max(10 * case["replay_max_abs_diff_float64"], 1e-5)
            findings.check(f"{name} {label}", out, arrays[case["out_key"]], tolerance)
            findings.check(f"{name} {label} t_seen", seen.times, arrays["t_seen"], 1e-9)
            if "xin_key" in case:
                findings.check(
                    f"{name} {label} xin", np.stack(seen.states), arrays[case["xin_key"]], tolerance
                )
            findings.cases += 1
    return findings


def test_guided_ddim_scaled_once_is_the_stated_distance_from_the_official_double_scaling(
    shared: Path,
) -> None:
    folder = shared / "reference" / "vectors" / "adm_ddim"
    file = json.loads((folder / "meta.json").read_text())["files"]["classifier_guided.npz"]
    with np.load(folder / "classifier_guided.npz") as archive:
        arrays = dict(archive)
    grid = discrete_grid(
        training_betas(file["noise_schedule"], file["diffusion_steps"]), file["timestep_respacing"]
    )
    times = grid.times.tolist()
    classes = torch.from_numpy(arrays["y"])
    draws = torch.from_numpy(arrays["z"])
    for label, case in file["cases"].items():
        network = Seen().of(toy_eps(file["net_params"], classes), times)
        once = guided(
            scaled(network, adm_schedule(case["lam"], grid.nfe)),
            toy_gradient(file["net_params"], times, classes),
            grid,
            clip=case["clip"],
        )
        out = ddim(
            once,
            torch.from_numpy(arrays["x_T"]),
            grid,
            lambda t: draws[grid.nfe - 1 - t],
            eta=case["eta"],
            clip=False,
        )
        difference = float(np.max(np.abs(out.numpy() - arrays[case["out_key"]])))
        stated = case["wrong_variant_max_abs_diff"]["guided_single_scaling"]
        assert difference == pytest.approx(stated, abs=2e-5), label


def edm_grid(settings: dict[str, Any], limits: tuple[float, float]) -> SigmaGrid:
    method = settings.get("solver", "heun")
    steps = settings["num_steps"]
    passed = {
        key: settings[key]
        for key in ("discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho", "alpha")
        if key in settings
    }
    churn = Churn(
        settings.get("S_churn", 0.0),
        settings.get("S_min", 0.0),
        float(settings.get("S_max", math.inf)),
        settings.get("S_noise", 1.0),
    )
    nfe = 2 * steps - 1 if method == "heun" else steps
    return sigma_grid(nfe, method=method, churn=churn, limits=limits, **passed)


def edm_case(
    case: dict[str, Any],
    file: dict[str, Any],
    arrays: Arrays,
    grid: SigmaGrid,
    seen: Seen,
    consistent: bool = False,
) -> Tensor:
    classes = torch.from_numpy(arrays["class_labels"]).argmax(1) if file["class_conditional"] else None
    network = seen.of(toy_denoiser(file["net_params"], classes), grid.times.tolist())
    schedule = Schedule.uniform(grid.nfe, case["settings"].get("eps_scaler", 1.0))
    if case["sampler"] == "ablation_sampler" and case["settings"].get("solver", "heun") == "heun":
        schedule = schedule.first_stages()
    if consistent:
        predict = change_of_variables(scaled(network, schedule), grid)
    else:
        predict = scaled(change_of_variables(network, grid), schedule)
    draws = (
        {}
        if "z" not in arrays
        else {s.t: torch.from_numpy(z) for s, z in zip(grid.steps, arrays["z"], strict=True)}
    )
    x = torch.from_numpy(arrays["latents"]).double() * grid.start
    return edm(predict, x, grid, draws.__getitem__)


def edm_findings(folder: Path) -> Findings:
    meta = json.loads((folder / "meta.json").read_text())
    findings = Findings()
    for name, file in meta["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        attributes = file["net_attributes"]
        assert set(attributes) <= {"sigma_min", "sigma_max"}
        limits = (attributes.get("sigma_min", 0.0), attributes.get("sigma_max", math.inf))
        for label, case in file["cases"].items():
            settings = case["settings"]
            grid = edm_grid(settings, limits)
            seen = Seen()
            out = edm_case(case, file, arrays, grid, seen)
            tolerance = 1e-5 if settings.get("discretization") == "iddpm" else 1e-9
            findings.check(f"{name} {label}", out, arrays[case["out_key"]], tolerance)
            sigmas = arrays[case["sigmas_key"]]
            findings.check(f"{name} {label} sigmas", seen.times / sigmas, np.ones_like(sigmas), tolerance)
            if "xin_key" in case:
                states = np.stack(seen.states)
                findings.check(f"{name} {label} xin", states, arrays[case["xin_key"]], tolerance)
            findings.cases += 1
    return findings


def test_edm_samplers_reproduce_every_official_case(shared: Path) -> None:
    findings = edm_findings(shared / "reference" / "vectors" / "edm")
    assert findings.cases > 0
    assert findings.wrong == []


def test_consistent_vp_scaling_is_the_stated_distance_from_the_official_mixed_one(shared: Path) -> None:
    folder = shared / "reference" / "vectors" / "edm"
    compared = 0
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        for label, case in file["cases"].items():
            stated = case["wrong_variant_max_abs_diff"].get("vp_consistent")
            if stated is None:
                continue
            grid = edm_grid(case["settings"], (0.0, math.inf))
            out = edm_case(case, file, arrays, grid, Seen(), consistent=True)
            difference = float(np.max(np.abs(out.numpy() - arrays[case["out_key"]])))
            assert difference == pytest.approx(stated, abs=1e-9), (name, label)
            compared += 1
    assert compared > 0


def test_the_pfgmpp_sampler_is_edm_s_from_a_start_that_is_not_multiplied(shared: Path) -> None:
    folder = shared / "reference" / "vectors" / "pfgmpp"
    findings = Findings()
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        with np.load(folder / name) as archive:
            arrays = dict(archive)
        classes = torch.from_numpy(arrays["class_labels"]).argmax(1) if file["class_conditional"] else None
        for label, case in file["cases"].items():
            assert case["sampler"] == "edm_sampler"
            grid = edm_grid(case["settings"], (0.0, math.inf))
            seen = Seen()
            network = seen.of(toy_denoiser(file["net_params"], classes), grid.times.tolist())
            predict = scaled(network, Schedule.uniform(grid.nfe, case["lam"]))
            out = edm(predict, torch.from_numpy(arrays[case["latents_key"]]), grid, {}.__getitem__)
            findings.check(f"{name} {label}", out, arrays[case["out_key"]], 1e-9)
            sigmas = arrays[case["sigmas_key"]]
            findings.check(f"{name} {label} sigmas", seen.times / sigmas, np.ones_like(sigmas), 1e-9)
            assert grid.nfe == case["network_calls"]
            findings.cases += 1
    assert findings.cases > 0
    assert findings.wrong == []
