"""The example jobs: all valid; those of networks in NVIDIA's format fit the files that they name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from samplers.models.ideal import load_ideal
from samplers.models.load import FORMATS, load_model
from samplers.sampling import AnalyticDDPM
from search.spec import load

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_an_example_is_a_valid_job(file: Path) -> None:
    spec = load(file)
    assert spec.model.format in FORMATS
    assert spec.sampling


def test_the_example_of_analytic_dpm_estimates_its_statistics() -> None:
    spec = load(EXAMPLES / "analytic-dpm.yaml")
    network = load_ideal(None, {"shape": [3, 32, 32], "points": 2, "time": "discrete"})
    for sampling in spec.sampling:
        assert isinstance(sampling, AnalyticDDPM)
        assert sampling.lacks_ms_eps
        assert sampling.plan(network).times.size == sampling.nfe


@pytest.mark.parametrize(
    ("name", "precond", "attributes"),
    [
        ("edm-cifar10", "EDMPrecond", {}),
        ("edm-vp", "VPPrecond", {}),
        ("edm-ve", "VEPrecond", {}),
        ("pfgmpp-cifar10", "EDMPrecond", {"pfgmpp": True, "D": 2048, "N": 192}),
    ],
)
def test_an_example_is_a_job_for_a_snapshot_of_its_kind(
    save_snapshot: Callable[..., Path], tmp_path: Path, name: str, precond: str, attributes: dict[str, Any]
) -> None:
    spec = load(EXAMPLES / f"{name}.yaml")
    assert spec.search.images == 50_000
    assert spec.model.path is not None
    (tmp_path / spec.model.path).parent.mkdir(exist_ok=True)
    save_snapshot(precond, name=spec.model.path, attributes=attributes)
    model = load_model(spec.model.format, spec.model.path, spec.model.options, tmp_path)
    for sampling in spec.sampling:
        assert sampling.plan(model).times.size == sampling.nfe


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library, about numpy
@pytest.mark.parametrize(
    "name", ["ddpm-diffusers", "ldm-diffusers", "ldm-imagenet-diffusers", "dit-diffusers"]
)
def test_an_example_is_a_job_for_a_folder_of_its_kind(folders: Any, name: str) -> None:
    parts = {
        "ddpm-diffusers": lambda: {"unet": folders.unet()},
        "ldm-diffusers": lambda: {"unet": folders.unet(), "vqvae": folders.vq()},
        "ldm-imagenet-diffusers": lambda: {"unet": folders.conditional(), "vqvae": folders.vq()},
        "dit-diffusers": lambda: {"transformer": folders.dit(), "vae": folders.kl()},
    }
    spec = load(EXAMPLES / f"{name}.yaml")
    folders.pipeline(**parts[name]())
    if file := spec.model.options.get("class_embedder"):
        torch.save({"embedding.weight": torch.zeros(1001, 16)}, folders.root.parent / file)
    model = load_model(spec.model.format, folders.root.name, spec.model.options, folders.root.parent)
    for sampling in spec.sampling:
        assert sampling.plan(model).times.size == sampling.nfe
