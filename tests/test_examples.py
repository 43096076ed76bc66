"""The example jobs of networks in NVIDIA's format: valid, and fitting the files that they name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samplers.models.load import load_model
from search.spec import load

EXAMPLES = Path(__file__).parents[1] / "examples"


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
@pytest.mark.parametrize("name", ["ddpm-diffusers", "ldm-diffusers", "dit-diffusers"])
def test_an_example_is_a_job_for_a_folder_of_its_kind(folders: Any, name: str) -> None:
    parts = {
        "ddpm-diffusers": lambda: {"unet": folders.unet()},
        "ldm-diffusers": lambda: {"unet": folders.unet(), "vqvae": folders.vq()},
        "dit-diffusers": lambda: {"transformer": folders.dit(), "vae": folders.kl()},
    }
    spec = load(EXAMPLES / f"{name}.yaml")
    folders.pipeline(**parts[name]())
    model = load_model(spec.model.format, folders.root.name, spec.model.options, folders.root.parent)
    for sampling in spec.sampling:
        assert sampling.plan(model).times.size == sampling.nfe
