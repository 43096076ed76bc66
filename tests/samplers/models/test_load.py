"""Picking the adapter by the format's name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samplers.errors import InputError
from samplers.models.load import FORMATS, load_model
from samplers.models.protocol import Model

Flags = dict[str, object]


def test_paths_start_in_the_folder_of_the_job_file(
    tmp_path: Path, save: Callable[..., Path], small_flags: Flags
) -> None:
    save(small_flags)
    np.save(tmp_path / "cloud.npy", np.zeros((2, 3, 8, 8)))
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x, t):\n        return x\n"
    )
    python: Flags = {"shape": [3, 8, 8], "time": "discrete", "prediction": "epsilon"}
    models: list[Model] = [
        load_model("adm", "network.pt", small_flags, tmp_path),
        load_model("ideal", "cloud.npy", {}, tmp_path),
        load_model("ideal", None, {"shape": [3, 8, 8], "std": 1}, tmp_path),
        load_model("python", "net.py:Net", python, tmp_path),
    ]
    x = torch.randn(2, 3, 8, 8)
    for model in models:
        assert model.to(torch.device("cpu")) is model
        assert model.shape == model.image_shape == (3, 8, 8)
        assert model(x, 5.0, None).eps.shape == x.shape
        assert model.pixels(x).dtype == torch.uint8
        assert (model.betas is None) == (model.time == "sigma") == (model.sigma_range is not None)
        assert model.gradient is None
        assert model.prior is None
        assert model.round_sigma is None
    assert len({model.fingerprint for model in models}) == len(models)


def test_an_absolute_path_is_taken_as_it_is(save: Callable[..., Path], small_flags: Flags) -> None:
    assert load_model("adm", str(save(small_flags)), small_flags, Path("/nowhere")).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("family", "path", "options", "message"),
    [
        (
            "edm2",
            "x",
            {},
            "model.format must be one of adm, diffusers, digits, edm, ideal, pfgmpp, python, not 'edm2'",
        ),
        ("adm", None, {}, "model.path is missing: format 'adm' needs the checkpoint"),
        ("python", "", {}, "model.path is missing: format 'python' needs file.py:factory"),
        ("edm", None, {}, "model.path is missing: format 'edm' needs the snapshot"),
        ("pfgmpp", None, {}, "model.path is missing: format 'pfgmpp' needs the snapshot"),
        ("digits", "x.pt", {}, "format 'digits' is bundled and takes no path"),
        ("digits", None, {"image_size": 8}, "format 'digits' has no option 'image_size'"),
    ],
)
def test_formats_paths_and_options_that_do_not_go_together_are_refused(
    family: str, path: str | None, options: Flags, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_model(family, path, options)


def test_the_formats_are_listed() -> None:
    assert FORMATS == ("adm", "diffusers", "digits", "edm", "ideal", "pfgmpp", "python")
