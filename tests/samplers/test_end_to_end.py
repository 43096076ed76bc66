"""Official checkpoints through our solvers against the images of the official samplers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.grids import DiscreteGrid, discrete_grid
from samplers.guidance import guided
from samplers.models.adm import AdmModel, load_adm
from samplers.models.edm import EdmModel, load_edm, load_pfgmpp
from samplers.prediction import Predict, Prediction
from samplers.sampling import EDM
from samplers.scaling import scaled
from samplers.schedule import Schedule
from samplers.solvers import ddim, ddpm


def _model(vectors: Path, about: dict[str, Any], scale: float) -> AdmModel:
    networks = json.loads((vectors / "checkpoints/meta.json").read_text())["files"]
    name = Path(about["checkpoint"]).name
    flags = networks[name]["flags"]
    if "classifier" in about:
        guide = Path(about["classifier"]).name
        # The bank runs a 16-pixel network on 32 pixels; its attention stays at the same depths.
        flags = {**flags, **networks[guide]["flags"], "attention_resolutions": "32,16"}
        flags |= {"classifier_path": guide, "classifier_scale": scale}
    return load_adm(vectors / "checkpoints" / name, flags, vectors / "checkpoints")


@pytest.mark.parametrize(
    ("file", "case"),
    [
        ("adm_uncond", "ddpm-l1"),
        ("adm_uncond", "ddpm-l1.017"),
        ("adm_uncond", "ddim-eta0-l1"),
        ("adm_uncond", "ddim-eta0-l1.017"),
        ("adm_cond", "ddpm-l1"),
        ("adm_cond", "ddpm-l1.017"),
        ("adm_guided", "ddpm-scale200-l1"),
        ("adm_guided", "ddpm-scale200-l1.004"),
        ("adm_guided", "ddim-scale200-l1.004"),
    ],
)
def test_adm_images_are_the_official_ones(shared: Path, file: str, case: str) -> None:
    vectors = shared / "reference/vectors"
    about = json.loads((vectors / "end_to_end/meta.json").read_text())["files"][f"{file}.npz"]
    wanted = about["cases"][case]
    with np.load(vectors / f"end_to_end/{file}.npz") as arrays:
        x, noise, expected = (torch.from_numpy(arrays[key]) for key in ("x_T", "z", wanted["out_key"]))
        labels = torch.from_numpy(arrays["y"]) if "y" in arrays else None
    model = _model(vectors, about, wanted.get("classifier_scale", 1.0))
    assert model.variance == about["variance"]
    grid = discrete_grid(model.betas, about["timestep_respacing"])
    schedule = Schedule.uniform(grid.nfe, wanted["lam"])

    def network(x: Tensor, t: int) -> Prediction:
        return model(x, float(grid.times[t]), labels)

    def gradient(x: Tensor, t: int) -> Tensor:
        assert model.gradient is not None
        assert labels is not None
        return model.gradient(x, float(grid.times[t]), labels)

    def draw(t: int) -> Tensor:
        return noise[grid.nfe - 1 - t]

    predict = scaled(network, schedule)
    guide = gradient if model.gradient is not None else None
    if wanted["sampler"] == "ddpm":
        out = ddpm(predict, x, grid, draw, variance=model.variance, clip=wanted["clip"], gradient=guide)
    elif guide is None:
        out = ddim(predict, x, grid, draw, eta=wanted["eta"], clip=wanted["clip"])
    else:
        out = ddim(
            _as_adm_es(predict, gradient, grid, schedule), x, grid, draw, eta=wanted["eta"], clip=False
        )
    # The bank says how far rounding alone moves these images; a missing lambda moves them a thousandfold.
    rounding = max(wanted["sensitivity_1e_6"], wanted["other_backend_diff"], wanted["replay_max_abs_diff"])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 + 3 * rounding)


def _as_adm_es(predict: Predict, gradient: Any, grid: DiscreteGrid, schedule: Schedule) -> Predict:
    """The official DDIM guidance divides by lambda twice."""
    return scaled(guided(predict, gradient, grid), schedule)


def test_edm_and_pfgmpp_images_are_the_official_ones(shared: Path) -> None:
    vectors = shared / "reference/vectors"
    compared = 0
    for name, about in json.loads((vectors / "end_to_end/meta.json").read_text())["files"].items():
        if about["system"] == "adm":
            continue
        file = vectors / "checkpoints" / Path(about["checkpoint"]).name
        model = load_edm(file, {}) if about["system"] == "edm" else load_pfgmpp(file, {"D": about["D"]})
        assert (model.prior is None) == (about["system"] == "edm")
        with np.load(vectors / "end_to_end" / name) as archive:
            arrays = {key: torch.from_numpy(archive[key]) for key in archive}
        for label, case in about["cases"].items():
            out = _edm_images(model, _sampling(case["sampler"], case["settings"]), case["lam"], arrays)
            rounding = max(case["sensitivity_1e_6"], case["other_backend_diff"], case["replay_max_abs_diff"])
            tolerance = 1e-5 + 3 * rounding
            assert case["lam"] == 1 or tolerance < case["no_scaling_max_abs_diff"] / 100
            difference = float((out - arrays[case["out_key"]]).abs().max())
            assert difference <= tolerance, (name, label, difference)
            compared += 1
    assert compared > 0


def _edm_images(model: EdmModel, sampling: EDM, lam: float, arrays: dict[str, Tensor]) -> Tensor:
    plan = sampling.plan(model)
    labels = arrays["class_labels"].argmax(1) if "class_labels" in arrays else None

    def network(x: Tensor, t: int) -> Prediction:
        return model(x, float(plan.times[t]), labels)

    def draw(t: int) -> Tensor:
        return arrays["z"][
            (plan.times.size - 1 - t) // 2
        ]  # only Heun's cases churn: two evaluations per step

    start = arrays["latents"].double() * (plan.start if model.prior is None else 1.0)
    with torch.no_grad():
        return plan.run(network, Schedule.uniform(sampling.nfe, lam), start, draw, None)


def _sampling(sampler: str, settings: dict[str, Any]) -> EDM:
    """The job's `sampling` that asks for what an official call did."""
    keys = {"S_churn", "S_min", "S_max", "S_noise", "discretization", "schedule", "scaling", "rho"}
    keys |= {"sigma_min", "sigma_max"}
    solver = settings.get("solver", "heun")
    steps = settings["num_steps"]
    assert settings.keys() <= keys | {"num_steps", "solver"}
    return EDM(
        solver=solver,
        nfe=steps if solver == "euler" else 2 * steps - 1,
        rule="edm-es-ablation" if sampler == "ablation_sampler" else "paper",
        **{key: value for key, value in settings.items() if key in keys},
    )
