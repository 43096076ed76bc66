"""The `adm` adapter: official outputs, flags against checkpoints, guidance."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.models.adm import AdmModel, AdmOptions, load_adm
from samplers.models.options import parse_options
from samplers.models.unet import UNet

Flags = dict[str, object]
Save = Callable[..., Path]


def _official(shared: Path, name: str) -> tuple[Path, Flags, dict[str, Tensor]]:
    """A checkpoint of the reference bank: the file, its flags, and its inputs and outputs."""
    folder = shared / "reference/vectors/checkpoints"
    flags: Flags = json.loads((folder / "meta.json").read_text())["files"][name]["flags"]
    with np.load(folder / f"{name}.io.npz") as arrays:
        return folder / name, flags, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def _close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["adm-uncond.pt", "adm-cond-legacy.pt"])
def test_official_checkpoints_give_the_official_output(shared: Path, name: str) -> None:
    path, flags, io = _official(shared, name)
    model = load_adm(path, flags)
    labels = io.get("y")
    for time, out in (("t", "out"), ("t_fractional", "out_fractional")):
        _close(model.network(io["x"], io[time], labels), io[out])
        for i in range(len(io["x"])):
            given = None if labels is None else labels[i : i + 1]
            said = model(io["x"][i : i + 1], float(io[time][i]), given)
            _close(said.eps if said.v is None else torch.cat([said.eps, said.v], dim=1), io[out][i : i + 1])


def test_the_official_classifier_gives_the_official_logits_and_gradient(shared: Path) -> None:
    path, flags, _ = _official(shared, "adm-cond-legacy.pt")
    guide, guide_flags, io = _official(shared, "adm-classifier.pt")
    # The same network asked for larger images: attention at the same depths.
    flags = {**flags, **guide_flags, "attention_resolutions": "32,16", "classifier_path": guide.name}
    model = load_adm(path, flags, path.parent)
    assert model.classifier is not None
    assert model.gradient is not None
    _close(model.classifier(io["x"], io["t"]), io["logits"])
    for i in range(len(io["x"])):
        slope = model.gradient(io["x"][i : i + 1], float(io["t"][i]), io["y"][i : i + 1])
        atol = 2e-5 * float(io["grad_log_prob"].abs().max())
        torch.testing.assert_close(slope, io["grad_log_prob"][i : i + 1], rtol=0, atol=atol)


def test_a_real_network_sees_noise_as_noise(shared: Path) -> None:
    flags: Flags = {
        "image_size": 32,
        "num_channels": 64,
        "channel_mult": "1,2,2,2",
        "num_head_channels": 32,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "learn_sigma": True,
        "dropout": 0.1,
        "noise_schedule": "cosine",
    }
    model = load_adm(shared / "models/adm-cifar10-small.pt", flags)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    said = model(x, 995.0, None)
    assert said.v is not None
    assert said.v.abs().max() < 3
    assert float(torch.corrcoef(torch.stack([said.eps.flatten(), x.flatten()]))[0, 1]) > 0.99


def test_a_half_precision_checkpoint_loads_into_float32(save: Save, small_flags: Flags) -> None:
    path = save(small_flags)
    state = {name: value.half() for name, value in torch.load(path, weights_only=True).items()}
    torch.save(state, path)
    model = load_adm(path, small_flags)
    assert all(torch.equal(value, state[name].float()) for name, value in model.network.state_dict().items())
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}


def test_predictions_have_the_dtype_of_the_state_and_split_off_the_variance(
    save: Save, small_flags: Flags
) -> None:
    model = load_adm(save(small_flags), small_flags)
    assert (model.shape, model.time, model.learned_range, model.num_classes) == (
        (3, 8, 8),
        "discrete",
        True,
        None,
    )
    assert model.betas.shape == (1000,)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    said = model(x, 300.0, None)
    raw = model.network(x.float(), torch.tensor(300.0))
    assert said.v is not None
    assert said.eps.dtype == said.v.dtype == torch.float64
    assert torch.equal(torch.cat([said.eps, said.v], dim=1), raw.double())
    assert model(x.float(), 300.0, None).eps.dtype == torch.float32


def test_labels_reach_a_class_conditional_network_only(save: Save, small_flags: Flags) -> None:
    flags = {**small_flags, "class_cond": True, "num_classes": 3}
    model = load_adm(save(flags), flags)
    assert model.num_classes == 3
    x = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    first, second = model(x, 300.0, torch.tensor([0, 2])).eps
    assert (first - second).abs().max() > 1e-3
    plain = load_adm(save(small_flags), small_flags)
    assert torch.equal(plain(x, 300.0, torch.tensor([0, 2])).eps, plain(x, 300.0, None).eps)


def test_rescaled_times_are_seen_in_units_of_a_thousand_steps(save: Save, small_flags: Flags) -> None:
    path = save(small_flags)
    plain = load_adm(path, small_flags)
    rescaled = load_adm(path, {**small_flags, "diffusion_steps": 4000, "rescale_timesteps": True})
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(rescaled(x, 1234.0, None).eps, plain(x, 308.5, None).eps)
    unscaled = load_adm(path, {**small_flags, "diffusion_steps": 4000})
    assert torch.equal(unscaled(x, 1234.0, None).eps, plain(x, 1234.0, None).eps)


def test_a_network_that_predicts_the_image_is_turned_into_one_that_predicts_noise(
    save: Save, small_flags: Flags
) -> None:
    path = save(small_flags)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x0 = load_adm(path, small_flags)(x, 600.0, None).eps
    model = load_adm(path, {**small_flags, "predict_xstart": True})
    abar = np.cumprod(1 - model.betas)[600]
    torch.testing.assert_close(abar**0.5 * x0 + (1 - abar) ** 0.5 * model(x, 600.0, None).eps, x)


def test_pixels_are_rounded_as_guided_diffusion_does(save: Save, small_flags: Flags) -> None:
    model = load_adm(save(small_flags), small_flags)
    x = torch.tensor([-1.2, -1.0, 0.0, 0.004, 0.9999, 1.0, 1.5])
    assert model.pixels(x).tolist() == [0, 0, 127, 128, 254, 255, 255]


@pytest.mark.parametrize(
    ("flags", "variance"),
    [
        ({}, "fixed_large"),
        ({"sigma_small": True}, "fixed_small"),
        ({"sigma_small": True, "learn_sigma": True}, "learned_range"),
    ],
)
def test_the_kind_of_variance_follows_from_the_flags(flags: Flags, variance: str) -> None:
    assert parse_options(AdmOptions, "adm", flags).variance == variance


def test_defaults_are_those_of_guided_diffusion() -> None:
    options = parse_options(AdmOptions, "adm", {})
    net = options.network(3)
    assert (options.image_size, net.num_channels, net.num_res_blocks, net.channel_mult) == (
        64,
        128,
        2,
        (1, 2, 3, 4),
    )
    assert (net.attention_factors, net.num_heads, net.num_heads_upsample, net.num_head_channels) == (
        (4, 8),
        4,
        4,
        -1,
    )
    assert (net.use_scale_shift_norm, net.resblock_updown, net.use_new_attention_order, net.num_classes) == (
        True,
        False,
        False,
        None,
    )
    assert (options.diffusion_steps, options.noise_schedule, options.variance) == (
        1000,
        "linear",
        "fixed_large",
    )
    guide = options.classifier(3)
    assert (guide.num_channels, guide.num_res_blocks, guide.attention_factors, guide.out_channels) == (
        128,
        2,
        (2, 4, 8),
        1000,
    )


@pytest.mark.parametrize(
    ("size", "mult"),
    [(32, (1, 2, 2, 2)), (128, (1, 1, 2, 3, 4)), (256, (1, 1, 2, 2, 4, 4)), (512, (0.5, 1, 1, 2, 2, 4, 4))],
)
def test_empty_channel_mult_follows_the_image_size(size: int, mult: tuple[float, ...]) -> None:
    options = parse_options(AdmOptions, "adm", {"image_size": size, "channel_mult": ""})
    assert options.network(3).channel_mult == mult


def test_lists_may_be_written_as_text_list_or_number() -> None:
    options = parse_options(AdmOptions, "adm", {"attention_resolutions": "16, 8", "channel_mult": [1, 0.5]})
    assert (options.attention_resolutions, options.channel_mult) == ((16, 8), (1, 0.5))
    assert parse_options(AdmOptions, "adm", {"attention_resolutions": 16}).attention_resolutions == (16,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learn_sigm": True}, "no option 'learn_sigm'; did you mean 'learn_sigma'"),
        ({"image_size": 48}, "image_size 48 needs channel_mult"),
        ({"image_size": 48, "channel_mult": "1,1,1,1,1,1"}, "image_size 48 cannot be halved 5 times"),
        ({"num_channels": "many"}, r"model\.options\.num_channels: .*'many'"),
        ({"attention_resolutions": "16,x"}, r"model\.options\.attention_resolutions\.1: .*'x'"),
        ({"timestep_respacing": "250"}, r"timestep_respacing .* sampling\.nfe"),
        ({"num_head_channels": 0}, "num_head_channels is 0"),
        ({"noise_schedule": "quadratic"}, "noise_schedule"),
        ({"classifier_pool": "spatial"}, r"classifier_pool: .*'attention'"),
    ],
)
def test_flags_that_cannot_be_are_refused_by_name(
    save: Save, small_flags: Flags, flags: Flags, message: str
) -> None:
    path = save(small_flags)
    base = {} if "image_size" in flags else small_flags
    with pytest.raises(InputError, match=message):
        load_adm(path, {**base, **flags})


WRONG: list[tuple[str, object, str, str]] = [
    ("num_channels", 64, "num_channels: 32 (now 64)", "time_embed.0.weight has the shape [128, 32]"),
    ("learn_sigma", False, "learn_sigma: true (now false)", "out.2.weight has the shape [6, 32, 3, 3]"),
    ("class_cond", False, "class_cond: true (now false)", "label_emb.weight has the shape [7, 128]"),
    ("num_classes", 9, "num_classes: 7 (now 9)", "the options ask for [9, 128]"),
    ("num_res_blocks", 2, "num_res_blocks: 1 (now 2)", "input_blocks.3.0.in_layers.2.weight has the"),
    ("channel_mult", "1,3", 'channel_mult: "1,2" (now "1,3")', "the options ask for [96, 32, 3, 3]"),
    ("channel_mult", "1,2,2", 'channel_mult: "1,2" (now "1,2,2")', "the options ask for no such parameter"),
    (
        "attention_resolutions",
        "8,4",
        'attention_resolutions: "4" (now "8,4")',
        "input_blocks.1.1.norm.weight is missing",
    ),
    ("use_scale_shift_norm", False, "use_scale_shift_norm: true (now false)", "emb_layers.1.weight"),
    ("resblock_updown", False, "resblock_updown: true (now false)", "input_blocks.2.0.in_layers.0.weight"),
]


@pytest.mark.parametrize(("flag", "wrong", "advice", "parameter"), WRONG)
def test_a_wrong_flag_is_told_with_the_parameter_and_the_flag_that_fits(
    save: Save, small_flags: Flags, flag: str, wrong: object, advice: str, parameter: str
) -> None:
    right = {**small_flags, "class_cond": True, "num_classes": 7}
    path = save(right)
    with pytest.raises(InputError) as caught:
        load_adm(path, {**right, flag: wrong})
    text = str(caught.value)
    assert str(path) in text
    assert f"Set {advice}. " in text  # this flag and no other
    assert parameter in text


@pytest.mark.parametrize(
    "changes",
    [
        {
            "resblock_updown": False,
            "num_res_blocks": 2,
            "attention_resolutions": "8,2",
            "channel_mult": "1,1,2",
        },
        {"use_scale_shift_norm": False, "num_channels": 64, "channel_mult": "0.5,1", "learn_sigma": False},
        {"channel_mult": "2", "attention_resolutions": "8", "class_cond": True, "num_classes": 4},
        {"num_res_blocks": 3, "attention_resolutions": ""},
    ],
)
def test_the_flags_that_are_advised_make_the_checkpoint_load(
    save: Save, small_flags: Flags, changes: Flags
) -> None:
    path = save({**small_flags, **changes})
    with pytest.raises(InputError) as caught:
        load_adm(path, {**small_flags, "num_channels": 96, "num_res_blocks": 5})
    advice = str(caught.value).split("Set ", 1)[1].split(". Parameters")[0]
    flags = dict(small_flags)
    for part in advice.split("), "):
        name, value = part.split(" (now ")[0].split(": ")
        flags[name] = value.strip('"')
    assert (
        load_adm(path, flags)
        .network(torch.zeros(1, 3, 8, 8), torch.tensor(0), torch.tensor([0]))
        .isfinite()
        .all()
    )


def test_a_state_dict_of_another_family_is_refused(tmp_path: Path) -> None:
    torch.save({"model.map_noise.weight": torch.zeros(2)}, tmp_path / "edm.pt")
    with pytest.raises(InputError, match=r"edm\.pt is no guided-diffusion network.*model\.map_noise\.weight"):
        load_adm(tmp_path / "edm.pt", {})


def test_parameters_with_strange_names_are_told_as_any_that_do_not_fit(
    save: Save, small_flags: Flags
) -> None:
    path = save(small_flags)
    torch.save({**torch.load(path, weights_only=True), "output_blocks.last": torch.zeros(2)}, path)
    with pytest.raises(
        InputError, match=r"output_blocks\.last has the shape \[2\] in the file, the options ask"
    ):
        load_adm(path, small_flags)


def test_grey_images_are_recognised_from_the_checkpoint(tmp_path: Path, small_flags: Flags) -> None:
    network = UNet(parse_options(AdmOptions, "adm", small_flags).network(1))
    torch.save(network.state_dict(), tmp_path / "grey.pt")
    model = load_adm(tmp_path / "grey.pt", small_flags)
    assert model.shape == (1, 8, 8)
    assert model(torch.zeros(2, 1, 8, 8), 5.0, None).eps.shape == (2, 1, 8, 8)


def test_the_fingerprint_follows_what_decides_the_predictions_and_nothing_else(
    save: Save, small_flags: Flags
) -> None:
    path = save(small_flags)
    base = load_adm(path, small_flags).fingerprint
    copy = path.with_name("copy.pt")
    shutil.copy(path, copy)
    assert base == load_adm(copy, {**small_flags, "dropout": 0.3}).fingerprint
    assert base == load_adm(path, {**small_flags, "channel_mult": [1, 2]}).fingerprint
    others = [
        load_adm(save(small_flags, "other.pt", seed=1), small_flags),
        load_adm(path, {**small_flags, "num_head_channels": 32}),
        load_adm(path, {**small_flags, "noise_schedule": "cosine"}),
        load_adm(path, {**small_flags, "predict_xstart": True}),
        load_adm(path, {**small_flags, "rescale_timesteps": True}),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


GUIDED: Flags = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "num_classes": 10,
    "classifier_path": "classifier.pt",
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
}


def _guided(save: Save, save_classifier: Save, **changes: Any) -> AdmModel:
    path = save(GUIDED)
    save_classifier(GUIDED)
    return load_adm(path, {**GUIDED, **changes}, path.parent)


def test_the_gradient_is_the_slope_of_the_log_probability(save: Save, save_classifier: Save) -> None:
    model = _guided(save, save_classifier, classifier_scale=3.0, rescale_timesteps=True, diffusion_steps=500)
    assert model.gradient is not None
    assert model.classifier is not None
    assert model.num_classes == 10  # labels must be drawn although the denoiser takes none
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    slope = model.gradient(x, 250.0, labels)
    step = 1e-4 * torch.randn(2, 3, 32, 32, dtype=torch.float64)
    exact = model.classifier.double()

    def log_p(image: Tensor) -> Tensor:
        log_odds: Tensor = exact(image, torch.tensor(500.0))
        return log_odds.log_softmax(dim=1)[torch.arange(2), labels]

    measured = log_p(x + step) - log_p(x - step)
    predicted = (2 * step * slope / 3.0).sum(dim=(1, 2, 3))
    torch.testing.assert_close(predicted, measured, rtol=1e-3, atol=0)


def test_the_gradient_can_be_taken_in_inference_mode(save: Save, save_classifier: Save) -> None:
    model = _guided(save, save_classifier)
    assert model.gradient is not None
    x, labels = torch.randn(1, 3, 32, 32), torch.tensor([3])
    expected = model.gradient(x, 250.0, labels)
    with torch.inference_mode():
        slope = model.gradient(x.clone(), 250.0, labels.clone())
    assert torch.equal(slope, expected)
    assert not slope.requires_grad
    assert slope.abs().max() > 0


def test_guidance_is_part_of_the_fingerprint(save: Save, save_classifier: Save) -> None:
    guided = _guided(save, save_classifier)
    assert guided.fingerprint != _guided(save, save_classifier, classifier_scale=2.0).fingerprint
    unguided = _guided(save, save_classifier, classifier_path="")
    assert unguided.gradient is None
    assert unguided.num_classes is None
    assert guided.fingerprint != unguided.fingerprint


@pytest.mark.parametrize(
    ("flag", "wrong", "advice"),
    [
        ("classifier_width", 64, "classifier_width: 32 (now 64)"),
        ("classifier_depth", 2, "classifier_depth: 1 (now 2)"),
        (
            "classifier_attention_resolutions",
            "16,8",
            'classifier_attention_resolutions: "8" (now "16,8")',
        ),
        ("classifier_use_scale_shift_norm", False, "classifier_use_scale_shift_norm: true (now false)"),
        ("classifier_resblock_updown", False, "classifier_resblock_updown: true (now false)"),
        ("num_classes", 11, "num_classes: 10 (now 11)"),
    ],
)
def test_a_wrong_classifier_flag_is_told_with_the_one_that_fits(
    save: Save, save_classifier: Save, flag: str, wrong: object, advice: str
) -> None:
    with pytest.raises(InputError) as caught:
        _guided(save, save_classifier, **{flag: wrong})
    assert f"classifier.pt does not fit model.options. Set {advice}. " in str(caught.value)


def test_a_classifier_for_another_image_size_is_told_by_its_positions(
    save: Save, save_classifier: Save
) -> None:
    path = save(GUIDED)
    save_classifier({**GUIDED, "image_size": 64})
    with pytest.raises(InputError, match="image_size: 64 \\(now 32\\)"):
        load_adm(path, GUIDED, path.parent)


def test_a_missing_classifier_is_named(save: Save) -> None:
    path = save(GUIDED)
    with pytest.raises(InputError, match=r"classifier\.pt cannot be read"):
        load_adm(path, GUIDED, path.parent)


def test_a_denoiser_and_a_classifier_are_not_taken_for_each_other(save: Save, save_classifier: Save) -> None:
    path, guide = save(GUIDED), save_classifier(GUIDED)
    with pytest.raises(InputError, match=r"classifier\.pt is a classifier: give it as classifier_path"):
        load_adm(guide, GUIDED, path.parent)
    with pytest.raises(InputError, match=r"network\.pt is no classifier with an attention pool"):
        load_adm(path, {**GUIDED, "classifier_path": path.name}, path.parent)
