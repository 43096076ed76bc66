"""The examples: jobs are valid and fit files of the formats that they name; scripts do what they say."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from samplers.models.ideal import load_ideal
from samplers.models.load import FORMATS, load_model
from samplers.sampling import AnalyticDDPM
from search import runner
from search.cli import main
from search.spec import SearchSpec, load

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


def test_an_own_network_is_made_searched_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["own_network.py", str(tmp_path / "mine"), "--steps", "2"])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "own_network.py"), run_name="__main__")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LAMTUNE_STORE", raising=False)
    assert len(list(Path("images").glob("*.png"))) == 600
    spec = load("job.yaml")
    quick = {
        "images": 60,
        "strategy": "paper",
        "b": {"coarse": 0.1, "fine": 0.1},
        "k": {"start": 0, "stop": 0},
    }
    quickly = spec.model_copy(update={"search": SearchSpec.model_validate(quick)})
    runner.submit(quickly, None, Console(quiet=True))
    words = ["--model", "discs", "--dataset", "discs", "--nfe", "10", "--job", "job.yaml", "-o", "best.json"]
    main.main(["export", *words], standalone_mode=False)
    runpy.run_path(str(EXAMPLES / "use_schedule.py"), run_name="__main__")
    assert "Fréchet distance" in capsys.readouterr().out
    with Image.open("images.png") as image:
        assert image.size == (16 * 16, 2 * 16)
