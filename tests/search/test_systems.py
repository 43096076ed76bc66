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

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers, about numpy
]

# λ = 1 and one more.
SEARCH = {
    "strategy": "paper",
    "images": 64,
    "confirm": 0,
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
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached statistics of one test."""
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Job, ...]]:
    """run(model, *samplings, **sections): submits a job in `tmp_path`, and checks that its results are in the store."""

    def run(model: Mapping[str, Any], *samplings: Mapping[str, Any], **sections: Any) -> tuple[Job, ...]:
        job = {
            "model": {"name": "tiny", **model},
            "dataset": {"name": "d", "reference": "digits"},
            "features": "digits",
            "sampling": samplings,
            "search": SEARCH,
            "resources": {"workers": 1},
            **sections,
        }
        url = f"sqlite:///{tmp_path}/lamtune.db"
        console = Console(file=StringIO(), force_terminal=False)
        jobs = submit(parse(job, "job.yaml", tmp_path), url, console)
        assert len(jobs) == len(samplings)
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


def in_colour(folder: Path, side: int) -> dict[str, Any]:
    """The sections of a job on images of 3×side×side."""
    torch.jit.script(Quarters()).save(str(folder / "features.ts"))
    data = {"name": "d", "reference": images(folder / "images.npz", channels=3, side=side)}
    return {"dataset": data, "features": "features.ts"}


# --- ADM ----------------------------------------------------------------------------------------------------


def test_adm_and_the_variances_it_learned(run: Run, tmp_path: Path) -> None:
    run(
        adm(tmp_path, learn_sigma=True, diffusion_steps=40, rescale_timesteps=True),
        {"solver": "ddpm", "nfe": 4},
        {"solver": "ddpm", "nfe": 6, "respacing": "3,2,1"},
        {"solver": "ddim", "nfe": 5, "eta": 0.5},
    )


def test_adm_with_classes(run: Run, tmp_path: Path) -> None:
    run(
        adm(tmp_path, class_cond=True, num_classes=10),
        {"solver": "ddpm", "nfe": 4, "variance": "fixed_small"},
    )


def test_adm_guided_by_a_classifier(run: Run, tmp_path: Path) -> None:
    guide = {
        "image_size": 32,
        "num_classes": 10,
        "classifier_path": "classifier.pt",
        "classifier_width": 32,
        "classifier_depth": 1,
        "classifier_attention_resolutions": "8",
    }
    run(adm(tmp_path, channels=3, **guide), {"solver": "ddpm", "nfe": 2}, **in_colour(tmp_path, 32))


# --- EDM and PFGM++ -----------------------------------------------------------------------------------------

GREY = {"img_channels": 1}


@pytest.mark.parametrize(
    ("precond", "network", "settings", "samplings"),
    [
        (
            "EDMPrecond",
            "SongUNet",
            {},
            [{"solver": "heun", "nfe": 5, "S_churn": 10, "S_noise": 1.01}, {"solver": "euler", "nfe": 4}],
        ),
        (
            "VPPrecond",
            "SongUNet",
            {},
            [{"solver": "euler", "nfe": 4, "discretization": "vp", "schedule": "vp", "scaling": "vp"}],
        ),
        (
            "VEPrecond",
            "SongUNet",
            {
                "embedding_type": "fourier",
                "encoder_type": "residual",
                "resample_filter": [1, 3, 3, 1],
                "attributes": {**GREY, "label_dim": 10},
            },
            [{"solver": "euler", "nfe": 4, "discretization": "ve", "schedule": "ve"}],
        ),
        (
            "iDDPMPrecond",
            "DhariwalUNet",
            {"model_channels": 32, "attributes": {**GREY, "label_dim": 10}},
            [{"solver": "heun", "nfe": 5, "discretization": "iddpm"}],
        ),
    ],
    ids=["edm", "vp", "ve", "iddpm"],
)
def test_edm_under_each_preconditioning(
    run: Run,
    save_snapshot: Callable[..., Path],
    nvidia: Any,
    precond: str,
    network: str,
    settings: dict[str, Any],
    samplings: list[dict[str, Any]],
) -> None:
    settings = {"attributes": GREY, **settings}
    if precond == "iDDPMPrecond":
        settings["buffers"] = {
            "u": nvidia.tensor(torch.cat([torch.linspace(90, 0.01, 1000), torch.zeros(1)]))
        }
    file = save_snapshot(precond, network, **settings)
    run({"format": "edm", "path": file.name}, *samplings)


def test_pfgmpp_from_its_prior(run: Run, save_snapshot: Callable[..., Path]) -> None:
    file = save_snapshot(attributes={**GREY, "pfgmpp": True, "D": 128, "N": 64})
    run({"format": "pfgmpp", "path": file.name, "options": {"D": 128}}, {"solver": "heun", "nfe": 5})


# --- Analytic-DPM -------------------------------------------------------------------------------------------


def test_analytic_dpm_estimates_its_statistics_from_the_images_of_the_dataset_or_takes_a_file_of_them(
    run: Run, tmp_path: Path, own_cache: Path
) -> None:
    torch.save(np.linspace(0, 1, 41, dtype=np.float32), tmp_path / "official.ms_eps.pth")
    samplings = (
        {"solver": "analytic_ddpm", "nfe": 4, "clip_sigma_idx": 1, "ms_eps_images": 20},
        {"solver": "analytic_ddim", "nfe": 5, "eta": 0.5, "ms_eps": "official.ms_eps.pth"},
    )
    data = {"name": "d", "reference": "digits", "images": images(tmp_path / "images.npz")}
    jobs = run(adm(tmp_path), *samplings, dataset=data)
    (file,) = own_cache.glob("*.ms_eps.npz")
    assert jobs[0].sampling["ms_eps"] is None
    with np.load(file) as archive:
        assert archive["ms_eps"].shape == (41,)
    moved = tmp_path / "moved.npz"
    images(moved)
    assert run(adm(tmp_path), *samplings, dataset={**data, "images": moved.name}) == jobs  # the same question


# --- networks of the user -----------------------------------------------------------------------------------

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


def test_a_plain_state_dict_under_ddpm_ddim_and_ldm_s_ddim(run: Run, tmp_path: Path) -> None:
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
    run(
        {"format": "python", "path": "own.py:Network", "options": options},
        {"solver": "ddpm", "nfe": 5},
        {"solver": "ddim", "nfe": 5, "eta": 0.0},
        {"solver": "ddim", "nfe": 8, "eta": 1.0},
        {"solver": "ldm_ddim", "nfe": 7, "ddim_steps": 6, "eta": 1.0, "temperature": 0.9},
    )


# --- diffusers ----------------------------------------------------------------------------------------------


def test_a_ddpm_pipeline_of_diffusers_under_our_solvers_and_its_schedulers(
    run: Run, folders: Any, tmp_path: Path
) -> None:
    folders.pipeline(unet=folders.unet(), config={"variance_type": "fixed_large"})
    run(
        {"format": "diffusers", "path": "pipeline"},
        {"solver": "ddim", "nfe": 4, "eta": 1.0},
        {"solver": "diffusers", "nfe": 5},
        {"solver": "diffusers", "nfe": 6, "scheduler": "DPMSolverMultistepScheduler"},
        {"solver": "diffusers", "nfe": 7, "scheduler": "HeunDiscreteScheduler"},
        **in_colour(tmp_path, 8),
    )


def test_a_latent_pipeline_with_a_vq_decoder(run: Run, folders: Any, tmp_path: Path) -> None:
    folders.pipeline(unet=folders.unet(), vqvae=folders.vq(), scheduler="DDIMScheduler", config=folders.betas)
    run(
        {"format": "diffusers", "path": "pipeline"},
        {"solver": "ldm_ddim", "nfe": 4, "eta": 0.5},
        **in_colour(tmp_path, 16),
    )


def test_a_latent_network_that_attends_to_its_class_with_guidance(
    run: Run, folders: Any, tmp_path: Path
) -> None:
    folders.pipeline(unet=folders.conditional(), vqvae=folders.vq(), config=folders.betas)
    torch.save({"embedding.weight": torch.randn(11, 16)}, tmp_path / "classes.pt")
    options = {"class_embedder": "classes.pt", "guidance_scale": 3.0}
    run(
        {"format": "diffusers", "path": "pipeline", "options": options},
        {"solver": "ldm_ddim", "nfe": 4},
        **in_colour(tmp_path, 16),
    )


def test_a_dit_of_v_predictions_with_guidance_and_a_kl_decoder(
    run: Run, folders: Any, tmp_path: Path
) -> None:
    folders.pipeline(
        transformer=folders.dit(),
        vae=folders.kl(),
        config={"prediction_type": "v_prediction", **folders.betas},
    )
    run(
        {"format": "diffusers", "path": "pipeline", "options": {"guidance_scale": 2.0, "num_classes": 10}},
        {"solver": "diffusers", "nfe": 4, "scheduler": "UniPCMultistepScheduler"},
        **in_colour(tmp_path, 8),
    )
