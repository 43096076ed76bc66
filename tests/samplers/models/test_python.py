"""The `python` adapter: calls, parametrisations, and mistakes in the user's code."""

import os
import sys
from pathlib import Path

import pytest
import torch

from samplers.errors import InputError
from samplers.models.python import load_python

SOURCE = '''
import torch
from torch import nn
from scale import FACTOR


class Net(nn.Module):
    """FACTOR * gain * x + t, plus the label where there is one."""

    def __init__(self, gain=1.0, twice=False):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.drawn = nn.Parameter(torch.randn(3))
        self.twice = twice
        self.seen = []

    def forward(self, x, t, labels=None):
        self.seen.append((x.dtype, t.dtype, tuple(t.shape)))
        y = FACTOR * self.gain * x + t.view(-1, 1, 1, 1)
        if labels is not None:
            y = y + labels.view(-1, 1, 1, 1)
        return torch.cat([y, -y], dim=1) if self.twice else y


number = 3


def broken():
    raise RuntimeError("no such luck")


def text():
    return "net"


def pooled():
    return nn.AdaptiveAvgPool2d(1)


class Small(nn.Module):
    def forward(self, x, t):
        return x[..., :1]


class Whole(nn.Module):
    def forward(self, x, t):
        return x.long()
'''

OPTIONS: dict[str, object] = {"shape": [1, 2, 2], "time": "sigma", "prediction": "epsilon"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder with net.py, and scale.py that it imports."""
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "scale.py").write_text("FACTOR = 2.0\n")
    sys.modules.pop("scale", None)
    return tmp_path


def test_the_module_gets_float32_states_and_a_time_per_image(folder: Path) -> None:
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    model = load_python("net.py:Net", {**OPTIONS, "arguments": {"gain": 3.0}}, folder)
    eps = model(x, 0.5, None).eps
    assert eps.dtype == torch.float64
    assert torch.equal(eps, (6 * x.float() + 0.5).double())
    assert model.network.seen[-1] == (torch.float32, torch.float32, (3,))  # type: ignore[index]
    discrete = load_python("net.py:Net", {**OPTIONS, "time": "discrete", "diffusion_steps": 50}, folder)
    assert torch.equal(discrete(x.float(), 7.0, None).eps, 2 * x.float() + 7)
    assert discrete.network.seen[-1] == (torch.float32, torch.int64, (3,))  # type: ignore[index]
    assert discrete.betas is not None
    assert len(discrete.betas) == 50
    assert discrete.sigma_range is None


def test_labels_go_to_networks_with_classes_only(folder: Path) -> None:
    x, labels = torch.randn(2, 1, 2, 2), torch.tensor([0, 4])
    with_classes = load_python("net.py:Net", {**OPTIONS, "num_classes": 5}, folder)
    assert torch.equal(with_classes(x, 1.0, labels).eps, 2 * x + 1 + labels.view(-1, 1, 1, 1))
    assert torch.equal(load_python("net.py:Net", OPTIONS, folder)(x, 1.0, labels).eps, 2 * x + 1)


@pytest.mark.parametrize("time", ["sigma", "discrete"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_every_parametrisation_is_turned_into_noise(folder: Path, time: str, prediction: str) -> None:
    model = load_python("net.py:Net", {**OPTIONS, "time": time, "prediction": prediction}, folder)
    at = 3.0
    alpha, sigma = model.process.coefficients(at)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    output = (2 * x.float() + at).double()
    eps = model(x, at, None).eps
    x0 = (x - sigma * eps) / alpha
    implied = {"epsilon": eps, "x0": x0, "v": (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5}
    torch.testing.assert_close(implied[prediction], output, rtol=1e-9, atol=1e-9)


def test_a_learned_range_is_split_off(folder: Path) -> None:
    options = {**OPTIONS, "learn_sigma": True, "arguments": {"twice": True}}
    model = load_python("net.py:Net", options, folder)
    assert model.learned_range
    assert model.variance == "learned_range"
    said = model(torch.ones(1, 1, 2, 2), 1.0, None)
    assert said.v is not None
    assert torch.equal(said.v, -said.eps)


def test_a_factory_in_a_package_is_found_beside_the_job_file(folder: Path) -> None:
    package = folder / "lamtune_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(SOURCE)
    model = load_python("lamtune_test_package.nets:Net", OPTIONS, folder)
    assert torch.equal(model(torch.ones(1, 1, 2, 2), 1.0, None).eps, torch.full((1, 1, 2, 2), 3.0))
    assert str(folder) not in sys.path


def test_every_process_draws_the_same_initial_weights_and_keeps_its_own_random_state(folder: Path) -> None:
    first = load_python("net.py:Net", OPTIONS, folder)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    second = load_python("net.py:Net", OPTIONS, folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.network.state_dict()["drawn"], second.network.state_dict()["drawn"])
    assert first.fingerprint == second.fingerprint


def test_weights_are_loaded_into_the_module(folder: Path) -> None:
    torch.save({"gain": torch.tensor(5.0), "drawn": torch.zeros(3)}, folder / "weights.pt")
    model = load_python("net.py:Net", {**OPTIONS, "weights": "weights.pt"}, folder)
    assert torch.equal(model(torch.ones(1, 1, 2, 2), 1.0, None).eps, torch.full((1, 1, 2, 2), 11.0))
    torch.save({"gain": torch.zeros(2), "extra": torch.zeros(3)}, folder / "other.pt")
    with pytest.raises(InputError, match=r"(?s)other\.pt does not fit the network.*drawn.*extra.*gain"):
        load_python("net.py:Net", {**OPTIONS, "weights": "other.pt"}, folder)
    with pytest.raises(InputError, match=r"absent\.pt cannot be read"):
        load_python("net.py:Net", {**OPTIONS, "weights": "absent.pt"}, folder)


def test_a_file_that_was_edited_within_a_second_to_the_same_length_is_run_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    x, answers = torch.ones(1, 1, 2, 2), []
    for sign in "+-":
        (folder / "net.py").write_text(SOURCE.replace("+ t.view", f"{sign} t.view"))
        os.utime(folder / "net.py", (1e9, 1e9))
        answers.append(load_python("net.py:Net", OPTIONS, folder)(x, 5.0, None).eps)
    assert (answers[0] > answers[1]).all()


def test_the_fingerprint_follows_source_weights_and_options(folder: Path) -> None:
    prints = [load_python("net.py:Net", OPTIONS, folder).fingerprint]
    prints.append(load_python("net.py:Net", {**OPTIONS, "prediction": "x0"}, folder).fingerprint)
    torch.save({"gain": torch.tensor(5.0), "drawn": torch.zeros(3)}, folder / "weights.pt")
    prints.append(load_python("net.py:Net", {**OPTIONS, "weights": "weights.pt"}, folder).fingerprint)
    (folder / "net.py").write_text(SOURCE.replace("+ t.view", "- t.view"))
    prints.append(load_python("net.py:Net", OPTIONS, folder).fingerprint)
    assert len(set(prints)) == 4
    (folder / "weights.pt").rename(folder / "renamed.pt")
    (folder / "net.py").write_text(SOURCE)
    assert load_python("net.py:Net", {**OPTIONS, "weights": "renamed.pt"}, folder).fingerprint == prints[2]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("net.py", "must be file.py:factory"),
        ("net.py:", "must be file.py:factory"),
        ("absent.py:Net", r"there is no file .*absent\.py"),
        ("absent_package.nets:Net", "importing absent_package.nets failed: ModuleNotFoundError"),
        ("net.py:Nett", r"net\.py has no 'Nett'"),
        ("net.py:number", "'number' is a int, not a function or class"),
        ("net.py:broken", "failed: RuntimeError: no such luck"),
        ("net.py:text", "text returned a str, not a torch.nn.Module"),
        ("net.py:pooled", r"calling the network with \(x, t\).* failed: TypeError"),
        ("net.py:Small", r"answers x of shape \[2, 1, 2, 2\] with \[2, 1, 2, 1\]"),
        ("net.py:Whole", r"returned a torch.int64 tensor, not a floating-point tensor"),
    ],
)
def test_mistakes_in_the_network_are_named(folder: Path, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_python(target, OPTIONS, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "score"}, r"model\.options\.prediction: .*'score'"),
        ({"arguments": {"depth": 3}}, "Net.*failed: TypeError.*'depth'"),
        ({"learn_sigma": True}, r"with \[2, 1, 2, 2\].* ask for \[2, 2, 2, 2\]"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min < sigma_max"),
        ({"classes": 3}, "no option 'classes'; did you mean 'num_classes'"),
    ],
)
def test_options_that_do_not_fit_the_network_are_named(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_python("net.py:Net", {**OPTIONS, **options}, folder)


def test_missing_options_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"options\.shape: Field required.*\.time.*\.prediction"):
        load_python("net.py:Net", {}, folder)


def test_an_error_while_importing_the_file_is_told(folder: Path) -> None:
    (folder / "net.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(InputError, match=r"importing net\.py failed: ZeroDivisionError"):
        load_python("net.py:Net", OPTIONS, folder)
