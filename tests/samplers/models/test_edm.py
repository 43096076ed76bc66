"""The adapters `edm` and `pfgmpp`: official outputs, closed forms, and what does not fit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from samplers.errors import InputError
from samplers.models.dhariwal import DhariwalArchitecture, DhariwalUNet
from samplers.models.edm import EdmModel, load_edm, load_pfgmpp, pfgmpp_prior, spread
from samplers.models.preconditioning import Edm, Iddpm, Preconditioning, Ve, Vp
from samplers.models.song import SongArchitecture, SongUNet

Save = Callable[..., Path]

PFGMPP = {"pfgmpp": True, "D": 128, "N": 192}


def denoised(model: EdmModel, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
    """D(x; sigma), from the noise that the model predicts."""
    with torch.no_grad():
        return x - sigma * model(x, sigma, labels).eps


# --- official outputs ---------------------------------------------------------------------------------------


def test_official_snapshots_give_the_official_output(shared: Path) -> None:
    folder = shared / "reference/vectors/checkpoints"
    compared = 0
    for name, about in json.loads((folder / "meta.json").read_text())["files"].items():
        if "precond" not in about:
            continue
        load = load_pfgmpp if "PFGM" in about["kind"] else load_edm
        model = load(folder / name, {})
        assert model.sigma_range == (about["sigma_min"], float(about["sigma_max"]))
        assert model.num_classes == (about["interface_kwargs"]["label_dim"] or None)
        with np.load(folder / about["io"]) as arrays:
            io = {key: torch.from_numpy(arrays[key]) for key in arrays}
        for key in io.keys() & {"out", "out_labels_none"}:
            labels = io["class_labels"].argmax(1) if "class_labels" in io and key == "out" else None
            for i, sigma in enumerate(io["sigma"].tolist()):
                label = None if labels is None else labels[i : i + 1]
                found = denoised(model, io["x"][i : i + 1].double(), sigma, label)
                tolerance = 2e-5 * float(io[key].abs().max())
                torch.testing.assert_close(
                    found, io[key][i : i + 1].double(), rtol=0, atol=tolerance, msg=f"{name} {key} {i}"
                )
                compared += 1
    assert compared > 0


def test_published_architectures_give_the_official_output(shared: Path, formula: Any) -> None:
    folder = shared / "reference/vectors/formula_nets"
    cases = json.loads((folder / "meta.json").read_text())["files"]["edm.npz"]["cases"]
    assert cases
    for name, about in cases.items():
        kwargs = dict(about["network_kwargs"])
        song = kwargs.pop("model_type") == "SongUNet"
        assert about["precond"] == "EDMPrecond"
        sides = {key: about[key] for key in ("img_resolution", "label_dim")}
        kwargs |= sides | {"in_channels": 3, "out_channels": 3}
        kind, build = (SongArchitecture, SongUNet) if song else (DhariwalArchitecture, DhariwalUNet)
        with torch.device("meta"):
            network: Any = build(TypeAdapter(kind).validate_python(kwargs))
        assert sum(p.numel() for p in network.parameters()) == about["num_params"]
        taps = torch.tensor(kwargs.get("resample_filter", [1, 1]), dtype=torch.float32)
        weights = {
            key: taps.outer(taps)[None, None] / taps.sum() ** 2 if key.endswith("_filter") else value
            for key, value in formula.weights(network, "model.").items()
        }
        network.load_state_dict(weights, assign=True)
        shape = tuple(about["x_shape"])
        x = math.sqrt(3) * formula.uniform("input:x", shape)
        x = torch.from_numpy(x.astype(np.float32) * np.float32(about["in_scale"]))
        model = EdmModel(network, Edm(0.5), shape[1:], about["label_dim"] or None, (0, math.inf), "")
        label = None if about["class_label"] is None else torch.tensor([about["class_label"]])
        out = denoised(model, x.double(), about["sigma"], label)
        with np.load(folder / "edm.npz") as arrays:
            expected = torch.from_numpy(arrays[about["out_key"]]).double()
        stride = about["stride"]
        tolerance = 2e-5 * about["out_max_abs"]
        torch.testing.assert_close(
            out[..., ::stride, ::stride], expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_official_prior_is_rebuilt_from_its_draws(shared: Path) -> None:
    folder = shared / "reference/vectors/pfgmpp"
    for name, about in json.loads((folder / "meta.json").read_text())["files"].items():
        with np.load(folder / name) as arrays:
            beta, gaussian, latents = (
                torch.from_numpy(arrays[k]) for k in ("beta_sample", "gaussian", "latents")
            )
        found = spread(beta.double(), gaussian.reshape(latents.shape), about["D"])
        torch.testing.assert_close(found, latents, rtol=2e-7, atol=2e-5)


# --- closed forms -------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """F(x, c_noise) = value, with as many channels as asked for; remembers what it was given."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.channels, self.value = channels, value
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen: tuple[Tensor, Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        self.seen = x, noise, labels
        return torch.full((len(x), self.channels, *x.shape[2:]), self.value)


LEVELS = torch.cat([torch.logspace(2, -2, 10), torch.zeros(1)])


@pytest.mark.parametrize("rule", [Edm(0.5), Vp(19.9, 0.1, 1000), Ve(), Iddpm(LEVELS)])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 90.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_network_gives_the_preconditioning(
    rule: Preconditioning, sigma: float, dtype: torch.dtype
) -> None:
    network = Constant(6 if isinstance(rule, Iddpm) else 3, 0.3)
    model = EdmModel(network, rule, (3, 4, 4), None, (0.0, math.inf), "")
    x = sigma * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    eps = model(x, sigma, None).eps
    assert eps.dtype == dtype
    c = rule.coefficients(sigma)
    expected = (x - (c.skip * x + c.out * 0.3)) / sigma
    torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-4)
    assert network.seen is not None
    given, noise, labels = network.seen
    torch.testing.assert_close(given, c.scale_in * x.float())
    assert noise.tolist() == [c.noise]
    assert labels is None


def test_labels_reach_the_network_one_hot_and_no_label_as_zeros() -> None:
    network = Constant(3, 0.0)
    model = EdmModel(network, Ve(), (3, 4, 4), 5, (0.02, 100.0), "")
    for labels, expected in (
        (torch.tensor([3, 0]), torch.eye(5)[[3, 0]]),
        (None, torch.zeros(1, 5)),
    ):
        model(torch.zeros(2, 3, 4, 4), 1.0, labels)
        assert network.seen is not None
        assert network.seen[2] is not None
        assert network.seen[2].tolist() == expected.tolist()


def test_only_iddpm_networks_round_their_levels() -> None:
    coarse = EdmModel(Constant(6, 0.0), Iddpm(LEVELS), (3, 4, 4), None, (0.01, 100.0), "")
    assert coarse.round_sigma is not None
    assert coarse.round_sigma(np.array([90.0])) == pytest.approx(100.0)
    assert EdmModel(Constant(3, 0.0), Ve(), (3, 4, 4), None, (0.02, 100.0), "").round_sigma is None


def test_pixels_are_edm_s() -> None:
    model = EdmModel(Constant(3, 0.0), Ve(), (3, 4, 4), None, (0.02, 100.0), "")
    assert model.pixels(torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0])).tolist() == [0, 0, 128, 191, 255]


@pytest.mark.parametrize(("shape", "d"), [((3, 8, 8), 128), ((1, 2, 2), 2048), ((3, 16, 16), 2048)])
def test_the_radius_of_the_prior_has_its_distribution(shape: tuple[int, int, int], d: int) -> None:
    x = pfgmpp_prior(5, torch.arange(3000), shape, d)
    assert x.dtype == torch.float64
    assert x.shape == (3000, *shape)
    squares = x.flatten(1).square().sum(dim=1).numpy()
    share = squares / (squares + 80**2 * d)  # R² = 80²·D·β/(1 - β)
    assert scipy.stats.kstest(share, scipy.stats.beta(math.prod(shape) / 2, d / 2).cdf).pvalue > 0.01
    # A point's coordinate along a fixed axis, over its radius: the direction is uniform on the sphere.
    along = (x.flatten(1)[:, 0] / x.flatten(1).norm(dim=1)).numpy()
    n = math.prod(shape)
    assert scipy.stats.kstest((along + 1) / 2, scipy.stats.beta((n - 1) / 2, (n - 1) / 2).cdf).pvalue > 0.01


def test_many_dimensions_make_the_prior_a_gaussian() -> None:
    x = pfgmpp_prior(1, torch.arange(2000), (1, 2, 2), 10**7)
    assert scipy.stats.kstest(x.flatten().numpy() / 80, "norm").pvalue > 0.01


def test_the_prior_is_a_function_of_seed_and_image() -> None:
    shape = (3, 4, 4)
    together = pfgmpp_prior(7, torch.arange(10, 16), shape, 128)
    alone = torch.cat([pfgmpp_prior(7, torch.tensor([i]), shape, 128) for i in range(10, 16)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert (pfgmpp_prior(8, torch.arange(10, 16), shape, 128) - together).abs().min() > 0


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precond", "settings"),
    [
        ("EDMPrecond", {}),
        ("EDMPrecond", {"attributes": {"label_dim": 5}}),
        ("VPPrecond", {"augment_dim": 9}),
        ("VEPrecond", {"embedding_type": "fourier", "encoder_type": "residual"}),
        ("iDDPMPrecond", {"network": "DhariwalUNet", "model_channels": 64}),
    ],
)
def test_a_snapshot_becomes_a_model(
    save_snapshot: Save, nvidia: Any, precond: str, settings: dict[str, Any]
) -> None:
    if precond == "iDDPMPrecond":
        settings = settings | {"buffers": {"u": nvidia.tensor(torch.linspace(90, 0, 1001))}}
    model = load_edm(save_snapshot(precond, **settings), {})
    assert model.shape == model.image_shape == (3, 8, 8)
    assert (model.prior, model.gradient, model.betas) == (None, None, None)
    assert model.to(torch.device("cpu")) is model
    labels = None if model.num_classes is None else torch.tensor([1, 4])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        eps = model(x, 0.7, labels).eps
    assert eps.dtype == x.dtype
    assert bool(torch.isfinite(eps).all())


def test_a_pfgmpp_snapshot_brings_its_prior(save_snapshot: Save) -> None:
    file = save_snapshot(attributes=PFGMPP)
    model = load_pfgmpp(file, {"D": 128})
    assert model.prior is not None
    torch.testing.assert_close(
        model.prior(3, torch.arange(2)), pfgmpp_prior(3, torch.arange(2), (3, 8, 8), 128), rtol=0, atol=0
    )
    with pytest.raises(InputError, match=r"model.options.D is 2048, but the network in .* has D 128"):
        load_pfgmpp(file, {"D": 2048})
    with pytest.raises(InputError, match="has no option 'aug_dim'"):
        load_pfgmpp(file, {"aug_dim": 128})


def test_a_snapshot_of_the_other_family_is_refused(save_snapshot: Save) -> None:
    with pytest.raises(InputError, match="no network of model.format 'edm'; use 'pfgmpp'"):
        load_edm(save_snapshot(attributes=PFGMPP), {})
    for attributes in ({}, {"pfgmpp": False}):
        with pytest.raises(InputError, match="no network of model.format 'pfgmpp'; use 'edm'"):
            load_pfgmpp(save_snapshot(attributes=attributes), {})


def test_the_fingerprint_is_that_of_the_file(save_snapshot: Save) -> None:
    file = save_snapshot()
    one = load_edm(file, {}).fingerprint
    assert load_edm(file.rename(file.with_name("other.pkl")), {}).fingerprint == one
    assert load_edm(save_snapshot(attributes={"sigma_data": 0.4}), {}).fingerprint != one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": {"sigma_data": "x"}}, "no number 'sigma_data'"),
        ({"attributes": {"sigma_min": float("nan")}}, "no number 'sigma_min'"),
        ({"attributes": {"sigma_min": 3, "sigma_max": 2}}, "sigma_min < sigma_max is needed"),
        (
            {"attributes": {"img_channels": 3.0}, "in_channels": 3, "out_channels": 3},
            "no count 'img_channels'",
        ),
        ({"in_channels": 4}, "the U-Net and its preconditioning are not of one shape"),
        ({"img_resolution": 16}, "the U-Net and its preconditioning are not of one shape"),
        ({"attributes": {**PFGMPP, "N": 3072}}, "N is 3072, but its images have 192 values"),
        ({"attributes": {**PFGMPP, "D": 0}}, "no count 'D'"),
    ],
)
def test_a_snapshot_that_contradicts_itself_is_refused(
    save_snapshot: Save, settings: dict[str, Any], message: str
) -> None:
    load = load_pfgmpp if "pfgmpp" in settings.get("attributes", {}) else load_edm
    with pytest.raises(InputError, match=message):
        load(save_snapshot(**settings), {})


def about(content: dict[str, Any]) -> dict[str, Any]:
    """The description of the U-Net in a snapshot."""
    found: dict[str, Any] = content["ema"].args[0]["state"]["_modules"]["model"].args[0]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["ema"].args[0].update(class_name="NewPrecond"), "the network is a NewPrecond"),
        (lambda c: c["ema"].args[0].update(class_name="iDDPMPrecond"), "has no count 'M'|lacks the noise"),
        (lambda c: about(c).update(class_name="NewUNet"), "U-Net is a NewUNet; SongUNet and DhariwalUNet"),
        (lambda c: kwargs(c).update(patch_size=2), "arguments of its SongUNet cannot be used: patch_size"),
        (lambda c: kwargs(c).update(num_blocks=10**9), "cannot be used: num_blocks"),
        (lambda c: kwargs(c).update(model_channels=2), "no SongUNet has the arguments that it gives"),
        (lambda c: kwargs(c).update(model_channels=16), "do not fit its SongUNet: .* is \\(.*\\), not \\("),
        (lambda c: kwargs(c).update(num_blocks=2), "4x4_block1.norm0.weight is \\(24,\\), not \\(32,\\)"),
        (
            lambda c: about(c)["state"]["_modules"]["dec"].state["_modules"].pop("8x8_up"),
            "dec.8x8_up.norm0.weight is absent, not \\(16,\\)",
        ),
    ],
)
def test_a_network_that_does_not_fit_its_description_is_refused(
    nvidia: Any, wire: Any, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = nvidia.snapshot()
    change(content)
    file = tmp_path / "net.pkl"
    file.write_bytes(wire.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        load_edm(file, {})
    assert str(file) in str(caught.value)


def kwargs(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the U-Net in a snapshot."""
    found: dict[str, Any] = about(content)["state"]["_init_kwargs"]
    return found


def test_there_are_no_options_for_edm(save_snapshot: Save) -> None:
    with pytest.raises(InputError, match="format 'edm' has no option 'D'; the snapshot holds them all"):
        load_edm(save_snapshot(), {"D": 128})
