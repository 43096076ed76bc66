"""Every system of the paper as a whole job: from the job file to the store, on tiny random networks in real formats."""

import math
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from samplers.models.adm import AdmOptions
from samplers.models.options import parse_options
from samplers.models.unet import Classifier, UNet
from search.runner import submit
from search.spec import parse
from storage import Job, open_store

pytestmark = pytest.mark.usefixtures("local_ray")

# λ = 1 and one more.
SEARCH = {
    "images": 64,
    "b": {"coarse": 0.01, "fine": 0.01, "start": 1, "stop": 1.01},
    "k": {"start": 0, "stop": 0},
}
ADM = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "noise_schedule": "cosine",
    "diffusion_steps": 40,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached statistics of one test."""
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Job, ...]]:
    """run(model, sampling, **sections): submits a job in `tmp_path`, and checks that its results are in the store."""

    def run(model: Mapping[str, Any], sampling: Mapping[str, Any], **sections: Any) -> tuple[Job, ...]:
        job = {
            "model": {"name": "tiny", **model},
            "dataset": {"name": "d", "reference": "digits"},
            "features": "digits",
            "sampling": sampling,
            "search": SEARCH,
            "resources": {"workers": 1},
            **sections,
        }
        url = f"sqlite:///{tmp_path}/lamtune.db"
        console = Console(file=StringIO(), force_terminal=False)
        jobs = submit(parse(job, "job.yaml", tmp_path), url, console)
        with open_store(url) as store:
            for found in jobs:
                assert (found.status, found.error) == ("finished", None)
                tried = store.evaluations(found.id)
                assert [(e.state, e.b, e.images) for e in tried] == [
                    ("complete", 1, 64),
                    ("complete", 1.01, 64),
                ]
                distances = [e.distance for e in tried if e.distance is not None]
                assert distances[0] != distances[1]
                assert all(math.isfinite(d) and d > 0 for d in distances)
                best = store.best(model="tiny", dataset="d", nfe=found.nfe, solver=found.solver)
                assert (best.distance, best.baseline_distance) == (min(distances), distances[0])
        return jobs

    return run


Run = Callable[..., tuple[Job, ...]]


def save_random(network: nn.Module, file: Path) -> None:
    """The state dict of a network with random weights (those of a new one are zero in places)."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(network.state_dict(), file)


def adm(folder: Path, channels: int = 1, **flags: Any) -> dict[str, Any]:
    """The model section of an ADM checkpoint with these flags, which is written."""
    options = {**ADM, **flags}
    chosen = parse_options(AdmOptions, "adm", options)
    save_random(UNet(chosen.network(channels)), folder / "network.pt")
    if chosen.classifier_path:
        save_random(
            Classifier(chosen.classifier(channels), chosen.image_size), folder / chosen.classifier_path
        )
    return {"format": "adm", "path": "network.pt", "options": options}


def images(file: Path, channels: int = 1, side: int = 8, count: int = 80) -> str:
    """An .npz of random images."""
    numbers = np.random.default_rng(0)
    np.savez(file, arr_0=numbers.integers(0, 256, (count, side, side, channels), dtype=np.uint8))
    return file.name


class Quarters(nn.Module):
    """The mean of each quarter of each channel, for images of a size for which there is no bundled extractor."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


# --- ADM ----------------------------------------------------------------------------------------------------


def test_adm_and_the_variances_it_learned(run: Run, tmp_path: Path) -> None:
    run(adm(tmp_path, learn_sigma=True), {"solver": "ddpm", "nfe": 4})


def test_adm_with_classes(run: Run, tmp_path: Path) -> None:
    run(
        adm(tmp_path, class_cond=True, num_classes=10),
        {"solver": "ddpm", "nfe": 4, "variance": "fixed_small"},
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_adm_guided_by_a_classifier(run: Run, tmp_path: Path) -> None:
    guide = {
        "image_size": 32,
        "num_classes": 10,
        "classifier_path": "classifier.pt",
        "classifier_width": 32,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "8",
    }
    torch.jit.script(Quarters()).save(str(tmp_path / "features.ts"))
    run(
        adm(tmp_path, channels=3, **guide),
        {"solver": "ddpm", "nfe": 2},
        dataset={"name": "d", "reference": images(tmp_path / "images.npz", channels=3, side=32)},
        features="features.ts",
    )


def test_adm_with_ddim(run: Run, tmp_path: Path) -> None:
    run(adm(tmp_path), {"solver": "ddim", "nfe": 5, "eta": 0.5})


# --- EDM and PFGM++ -----------------------------------------------------------------------------------------

GREY = {"img_channels": 1}


@pytest.mark.parametrize(
    ("precond", "network", "settings", "sampling"),
    [
        ("EDMPrecond", "SongUNet", {}, {"solver": "heun", "nfe": 5, "S_churn": 10}),
        (
            "EDMPrecond",
            "DhariwalUNet",
            {"model_channels": 32, "attributes": {**GREY, "label_dim": 10}},
            {"solver": "euler", "nfe": 4},
        ),
        (
            "VPPrecond",
            "SongUNet",
            {},
            {"solver": "euler", "nfe": 4, "discretization": "vp", "schedule": "vp", "scaling": "vp"},
        ),
        (
            "VEPrecond",
            "SongUNet",
            {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
            {"solver": "euler", "nfe": 4, "discretization": "ve", "schedule": "ve"},
        ),
        (
            "iDDPMPrecond",
            "DhariwalUNet",
            {"model_channels": 32},
            {"solver": "heun", "nfe": 5, "discretization": "iddpm"},
        ),
    ],
    ids=["edm", "edm-classes", "vp", "ve", "iddpm"],
)
def test_edm_under_each_preconditioning(
    run: Run,
    save_snapshot: Callable[..., Path],
    nvidia: Any,
    precond: str,
    network: str,
    settings: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    settings = {"attributes": GREY, **settings}
    if precond == "iDDPMPrecond":
        settings["buffers"] = {
            "u": nvidia.tensor(torch.cat([torch.linspace(90, 0.01, 1000), torch.zeros(1)]))
        }
    file = save_snapshot(precond, network, **settings)
    run({"format": "edm", "path": file.name}, sampling)


def test_pfgmpp_from_its_prior(run: Run, save_snapshot: Callable[..., Path]) -> None:
    file = save_snapshot(attributes={**GREY, "pfgmpp": True, "D": 128, "N": 64})
    run({"format": "pfgmpp", "path": file.name, "options": {"D": 128}}, {"solver": "heun", "nfe": 5})


# --- Analytic-DPM and LDM -----------------------------------------------------------------------------------


def test_analytic_dpm_estimates_its_statistics_from_the_images_of_the_dataset(
    run: Run, tmp_path: Path, cache: Path
) -> None:
    sampling = {"solver": "analytic_ddpm", "nfe": 4, "clip_sigma_idx": 1, "ms_eps_images": 20}
    data = {"name": "d", "reference": "digits", "images": images(tmp_path / "images.npz")}
    (job,) = run(adm(tmp_path), sampling, dataset=data)
    (file,) = cache.glob("*.ms_eps.npz")
    assert job.sampling["ms_eps"] is None
    with np.load(file) as archive:
        assert archive["ms_eps"].shape == (41,)
    moved = tmp_path / "moved.npz"
    images(moved)
    assert run(adm(tmp_path), sampling, dataset={**data, "images": moved.name}) == (job,)  # the same question


def test_analytic_ddim_takes_a_file_of_statistics(run: Run, tmp_path: Path, cache: Path) -> None:
    torch.save(np.linspace(0, 1, 41, dtype=np.float32), tmp_path / "official.ms_eps.pth")
    run(adm(tmp_path), {"solver": "analytic_ddim", "nfe": 5, "eta": 0.5, "ms_eps": "official.ms_eps.pth"})
    assert not list(cache.glob("*.ms_eps.npz"))


NETWORK = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + (t / 1000)[:, None, None, None]))
"""


def test_ldm_ddim_of_a_state_dict_of_the_users_own_network(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(NETWORK)
    names: dict[str, Any] = {}
    exec(NETWORK, names)
    save_random(names["Network"](6), tmp_path / "weights.pt")
    options = {
        "shape": [1, 8, 8],
        "time": "discrete",
        "prediction": "epsilon",
        "arguments": {"width": 6},
        "weights": "weights.pt",
    }
    model = {"format": "python", "path": "own.py:Network", "options": options}
    run(model, {"solver": "ldm_ddim", "nfe": 7, "ddim_steps": 6, "eta": 1.0, "temperature": 0.9})


# --- without a checkpoint -----------------------------------------------------------------------------------


def test_the_bundled_digits(run: Run) -> None:
    run({"format": "digits"}, {"solver": "ddpm", "nfe": 3})


def test_the_exact_denoiser_of_a_point_cloud(run: Run) -> None:
    (job,) = run(
        {"format": "ideal", "options": {"shape": [1, 8, 8], "points": 30}}, {"solver": "heun", "nfe": 5}
    )
    assert job.spec["search"]["images"] == 64
