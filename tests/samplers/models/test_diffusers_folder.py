"""Folders of the diffusers library: what is read, predicted, guided and decoded, and what is refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.generate import Sampler
from samplers.grids import training_betas
from samplers.models.diffusers_folder import load_diffusers
from samplers.models.diffusers_model import Decoder
from samplers.models.load import load_model
from samplers.prediction import Prediction
from samplers.rounding import float32
from samplers.sampling import DDIM, LDM, Diffusers
from samplers.scaling import scaled
from samplers.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's, about numpy

CPU = torch.device("cpu")
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([2, 0, 4])


def same(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


def test_an_unconditional_network_predicts_what_the_library_s_does(folders: Any) -> None:
    network = folders.unet()
    path = folders.pipeline(unet=network, config={"variance_type": "fixed_large"})
    model = load_model("diffusers", path.name, {}, path.parent)
    assert (model.shape, model.image_shape, model.num_classes) == ((3, 8, 8), (3, 8, 8), None)
    assert (model.time, model.variance, model.learned_range) == ("discrete", "fixed_large", False)
    assert model.betas is not None
    np.testing.assert_array_equal(model.betas, training_betas("linear", 1000))
    for time in (0, 500, 999, 321.25):
        with torch.no_grad():
            same(model(X, time, None).eps, network(X, time if time != 321.25 else torch.tensor(time)).sample)
    assert model(X.double(), 500, None).eps.dtype == torch.float64


@pytest.mark.parametrize(("kind", "sign"), [("v_prediction", "v"), ("sample", "x0")])
def test_other_predictions_are_converted_to_noise(folders: Any, kind: str, sign: str) -> None:
    network = folders.unet()
    model = load_diffusers(folders.pipeline(unet=network, config={"prediction_type": kind}), {})
    abar = float(np.prod(1 - model.betas[:401]))
    with torch.no_grad():
        answer = network(X, 400).sample
    x0 = answer if sign == "x0" else abar**0.5 * X - (1 - abar) ** 0.5 * answer
    same(model(X, 400, None).eps, (X - abar**0.5 * x0) / (1 - abar) ** 0.5, 1e-5)


def test_between_two_timesteps_the_level_lies_between(folders: Any) -> None:
    model = load_diffusers(folders.pipeline(unet=folders.unet()), {})
    (a0, s0), (a, s), (a1, s1) = (model.level(t) for t in (10, 10.5, 11))
    assert s / a == pytest.approx((s0 / a0 * s1 / a1) ** 0.5, rel=1e-12)
    assert a * a + s * s == pytest.approx(1, rel=1e-12)


def test_a_class_conditional_u_net_takes_labels_and_guidance(folders: Any) -> None:
    network = folders.unet(num_class_embeds=6)
    path = folders.pipeline(unet=network)
    assert load_diffusers(path, {}).num_classes == 6
    model = load_diffusers(path, {"guidance_scale": 3.0})
    assert model.num_classes == 5  # the last row is "no class"
    with torch.no_grad():
        given = network(X, 400, LABELS).sample
        without = network(X, 400, torch.full((3,), 5)).sample
    same(load_diffusers(path, {})(X, 400, LABELS).eps, given)
    same(model(X, 400, LABELS).eps, without + 3 * (given - without), 2e-6)
    same(load_diffusers(path, {"guidance_scale": 1.0, "num_classes": 5})(X, 400, LABELS).eps, given)


CLASSES = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))


def attending(folders: Any, **settings: Any) -> tuple[Any, Path]:
    """LDM's class-conditional network: a U-Net that attends to one token per class, a VQ decoder, and the embedding
    of five classes and none."""
    network = folders.conditional(**settings)
    path = folders.pipeline(unet=network, vqvae=folders.vq(), scheduler="DDIMScheduler", config=folders.betas)
    torch.save({"embedding.weight": CLASSES}, path / "class_embedder.pt")
    return network, path


def test_a_u_net_that_attends_to_its_class_takes_labels_guidance_and_no_class(folders: Any) -> None:
    network, path = attending(folders)
    file = str(path / "class_embedder.pt")

    def model(**options: Any) -> Any:
        return load_diffusers(path, {"class_embedder": file, **options})

    with torch.no_grad():
        given = network(X, 400, CLASSES[LABELS][:, None]).sample
        without = network(X, 400, CLASSES[-1].expand(3, 1, 16)).sample
    assert (given - without).abs().max() > 0.01
    assert (model().num_classes, model(guidance_scale=3.0).num_classes) == (6, 5)
    assert (model().shape, model().image_shape) == ((3, 8, 8), (3, 16, 16))
    same(model(num_classes=5)(X, 400, LABELS).eps, given)
    same(model(guidance_scale=1.0)(X, 400, LABELS).eps, given)
    same(model(guidance_scale=3.0)(X, 400, LABELS).eps, without + 3 * (given - without), 2e-6)
    same(model(guidance_scale=0.0)(X, 400, LABELS).eps, without)


def test_its_sampling_equals_ldm_s_loop_with_guidance_and_scaling_written_into_it(folders: Any) -> None:
    network, path = attending(folders)
    options = {"class_embedder": str(path / "class_embedder.pt"), "guidance_scale": 2.5}
    model, sampling = load_diffusers(path, options), LDM("ldm_ddim", 5, eta=0.4)
    schedule = Schedule.linear(5, 0.01, 0.98)
    plan = sampling.plan(model)

    def noise(t: int) -> Tensor:
        return torch.randn(X.shape, generator=torch.Generator().manual_seed(t))

    got = plan.run(lambda x, t: model(x, float(plan.times[t]), LABELS), schedule, X, noise, None)
    timesteps = [1, 201, 401, 601, 801]
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    x = X
    for t in reversed(range(5)):
        now, then = abar[timesteps[t]], abar[timesteps[t - 1] if t else 0]
        context = torch.cat([CLASSES[-1].expand(3, 16), CLASSES[LABELS]])[:, None]
        with torch.no_grad():
            without, given = network(torch.cat([x, x]), timesteps[t], context).sample.chunk(2)
        eps = (without + 2.5 * (given - without)) / schedule.lambdas[t]
        sigma = 0.4 * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        x = then**0.5 * x0 + (1 - then - sigma**2) ** 0.5 * eps + sigma * noise(t)
    same(got, x, 1e-5)


def test_the_embedding_of_classes_may_lie_anywhere_as_safetensors_and_counts_for_the_fingerprint(
    folders: Any, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    network, path = attending(folders)
    save_file({"weight": CLASSES}, tmp_path / "classes.safetensors")
    options = {"class_embedder": "classes.safetensors", "guidance_scale": 2.0}
    model = load_model("diffusers", path.name, options, tmp_path)
    with torch.no_grad():
        given, without = (
            network(X, 400, rows[:, None]).sample for rows in (CLASSES[LABELS], CLASSES[-1].expand(3, 16))
        )
    same(model(X, 400, LABELS).eps, 2 * given - without, 2e-6)
    save_file({"weight": CLASSES + 1}, tmp_path / "classes.safetensors")
    assert load_model("diffusers", path.name, options, tmp_path).fingerprint != model.fingerprint


def test_a_conditional_u_net_without_cross_attention_is_used_with_its_label_embedding_or_none(
    folders: Any,
) -> None:
    plain: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    for classes in (None, 6):
        network = folders.conditional(num_class_embeds=classes, **plain)
        path = folders.pipeline(unet=network)
        labels = None if classes is None else LABELS
        with torch.no_grad():
            wanted = network(X, 400, None, class_labels=labels).sample
        model = load_diffusers(path, {})
        assert model.num_classes == classes
        same(model(X, 400, labels).eps, wanted)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (CLASSES, {}, "holds a Tensor, where a state dict"),
        ({"a": CLASSES, "b": CLASSES}, {}, r"holds 2 tensors \(a, b …\); save the embedding alone"),
        ({"weight": CLASSES[:, :8]}, {}, r"weight in .* is \[6, 8\], but .* context of width 16"),
        ({"weight": CLASSES[0]}, {}, r"weight in .* is \[16\]"),
        ({"weight": CLASSES / 0}, {}, "holds NaN or infinity"),
        ({"weight": CLASSES}, {"num_classes": 7}, "the network knows 6, not 7"),
        ({"weight": CLASSES}, {"num_classes": 6, "guidance_scale": 2.0}, "the network knows 5, not 6"),
    ],
)
def test_an_embedding_of_classes_that_does_not_fit_is_refused(
    folders: Any, content: object, options: dict[str, Any], message: str
) -> None:
    _, path = attending(folders)
    torch.save(content, path / "class_embedder.pt")
    with pytest.raises(InputError, match=message):
        load_diffusers(path, {"class_embedder": str(path / "class_embedder.pt"), **options})


def test_networks_of_prompts_are_refused_with_the_way_for_classes(folders: Any, tmp_path: Path) -> None:
    _, path = attending(folders)
    with pytest.raises(
        InputError, match=r"name the file .* as model\.options\.class_embedder.* give it a text"
    ):
        load_diffusers(path, {})
    with pytest.raises(InputError, match=r"absent\.pt cannot be read"):
        load_diffusers(path, {"class_embedder": str(tmp_path / "absent.pt")})
    claims = json.dumps({"weight": {"dtype": "F32", "shape": [2**40, 16], "data_offsets": [0, 2**46]}})
    for content in (
        b"no",
        struct.pack("<Q", 2**62),
        struct.pack("<Q", len(claims)) + claims.encode() + b"0000",
    ):
        (tmp_path / "no.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"no\.safetensors is damaged"):
            load_diffusers(path, {"class_embedder": str(tmp_path / "no.safetensors")})
    for key, value in (("encoder_hid_dim", 8), ("addition_embed_type", "text"), ("num_class_embeds", 9)):
        before = (path / UNET).read_text()
        changed(path / UNET, **{key: value})
        with pytest.raises(InputError, match=f"{key} cannot be used together with cross-attention"):
            load_diffusers(path, {"class_embedder": str(path / "class_embedder.pt")})
        (path / UNET).write_text(before)


def test_scaling_divides_the_guided_noise(folders: Any) -> None:
    model = load_diffusers(folders.pipeline(unet=folders.unet(num_class_embeds=6)), {"guidance_scale": 3.0})
    predict = scaled(lambda x, t: model(x, 400, LABELS), Schedule.uniform(1, 1.25))
    same(predict(X, 0).eps, model(X, 400, LABELS).eps / 1.25)


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_dit_equals_the_library_s_pipeline(folders: Any, scheduler: str, scale: float | None) -> None:
    network, vae = folders.dit(), folders.kl()
    path = folders.pipeline(transformer=network, vae=vae, scheduler=scheduler)
    model = load_diffusers(path, {} if scale is None else {"guidance_scale": scale})
    assert (model.shape, model.image_shape) == ((4, 4, 4), (3, 8, 8))
    assert (model.num_classes, model.variance) == (1000, "learned_range")
    pipe = diffusers.DiTPipeline(network, vae, getattr(diffusers, scheduler)())
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(LABELS.tolist(), scale or 1.0, torch.Generator().manual_seed(5), 8, output_type="np").images
    plan = Diffusers("diffusers", 8).plan(model)
    start = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    one = Schedule.uniform(8, 1.0)

    def predict(x: Tensor, t: int) -> Prediction:
        return model(x, float(plan.times[t]), LABELS)

    with torch.no_grad():
        final = plan.run(predict, one, start, lambda t: torch.zeros_like(start), None)
        pixels = model.pixels(final).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - np.rint(wanted * 255).astype(int)).max() <= 1
    assert np.mean(pixels == np.rint(wanted * 255)) > 0.99


@pytest.mark.parametrize("old", [False, True])
def test_a_dit_predicts_what_the_library_s_does_and_the_range_of_its_variance(
    folders: Any, old: bool
) -> None:
    network = folders.dit()
    path = folders.pipeline(transformer=network, vae=folders.kl())
    if old:  # folders of the published networks
        config = path / "transformer" / "config.json"
        config.write_text(config.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    model = load_diffusers(path, {"guidance_scale": 4.0})
    with torch.no_grad():
        twice = torch.cat([LATENTS, LATENTS])
        labels = torch.cat([LABELS, torch.full((3,), 1000)])
        out = network(twice, torch.full((6,), 400), labels).sample
        got = model(LATENTS, 400, LABELS)
    given, without = out[:, :4].chunk(2)
    same(got.eps, without + 4 * (given - without), 2e-6)
    assert got.v is not None
    same(got.v, out[:3, 4:])


def test_vq_latents_are_decoded_as_the_library_s_pipeline_does(folders: Any) -> None:
    unet, vq = folders.unet(), folders.vq()
    scheduler = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, **folders.betas}
    path = folders.pipeline(unet=unet, vqvae=vq, scheduler="DDIMScheduler", config=scheduler)
    model = load_diffusers(path, {})
    assert (model.shape, model.image_shape) == ((3, 8, 8), (3, 16, 16))
    pipe = diffusers.LDMPipeline(vqvae=vq, unet=unet, scheduler=diffusers.DDIMScheduler(**scheduler))
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(3, torch.Generator().manual_seed(5), num_inference_steps=8, output_type="np").images
    plan = Diffusers("diffusers", 8).plan(model)
    start = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        final = plan.run(
            lambda x, t: model(x, float(plan.times[t]), None),
            Schedule.uniform(8, 1.0),
            start,
            lambda t: torch.zeros_like(start),
            None,
        )
        pixels = model.pixels(final).permute(0, 2, 3, 1).numpy()
    assert np.mean(np.abs(pixels.astype(int) - np.rint(wanted * 255).astype(int)) <= 1) == 1
    assert np.mean(pixels == np.rint(wanted * 255)) > 0.99


@pytest.mark.parametrize(("convolutions", "rounded"), [(None, "ieee"), ("tf32", "tf32")])
def test_a_decoder_s_convolutions_round_as_asked_and_nothing_else_does(
    folders: Any, monkeypatch: pytest.MonkeyPatch, convolutions: Any, rounded: str
) -> None:
    decoder = Decoder(folders.vq())
    decoder.convolutions = convolutions
    conv: Any = torch.backends.cudnn.conv
    matmul, seen = torch.backends.cuda.matmul.fp32_precision, []

    def decode(latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append((conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder.network, "decode", decode)
    with float32(convolutions="ieee"):
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder(LATENTS[:, :3])
        assert conv.fp32_precision == "ieee"
    assert seen == [(rounded, matmul)]


@pytest.mark.parametrize("shift", [None, 0.1])
def test_kl_latents_are_decoded_in_parts(
    folders: Any, monkeypatch: pytest.MonkeyPatch, shift: float | None
) -> None:
    vae = folders.kl(shift_factor=shift)
    model = load_diffusers(folders.pipeline(transformer=folders.dit(), vae=vae), {})
    with torch.no_grad():
        decoded = vae.decode(LATENTS / vae.config.scaling_factor + (shift or 0)).sample
        wanted = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        assert model.pixels(LATENTS).shape == (3, 3, 8, 8)
        torch.testing.assert_close(model.pixels(LATENTS), wanted, rtol=0, atol=0)
        monkeypatch.setattr("samplers.models.diffusers_model._PIXELS_AT_ONCE", 128)
        torch.testing.assert_close(model.pixels(LATENTS), wanted, rtol=0, atol=1)


def test_images_are_rounded_as_the_library_does(folders: Any) -> None:
    model = load_diffusers(folders.pipeline(unet=folders.unet()), {})
    x = torch.tensor([-3.0, -1.0, 0.0, 0.2, 1.0, 7.0]).reshape(1, 1, 1, 6)
    array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    wanted = np.asarray(diffusers.DiffusionPipeline.numpy_to_pil(array)[0])
    np.testing.assert_array_equal(model.pixels(x).numpy().ravel(), wanted.ravel())
    assert model.pixels(x).tolist() == [[[[0, 0, 128, 153, 255, 255]]]]


def test_a_guided_latent_job_samples_the_same_images_in_any_batch(folders: Any) -> None:
    path = folders.pipeline(transformer=folders.dit(), vae=folders.kl())
    model = load_diffusers(path, {"guidance_scale": 2.0, "num_classes": 10})
    sampling = Diffusers("diffusers", 5, "DDIMScheduler", {"eta": 1.0, "clip_sample": False})
    schedule = Schedule.linear(5, 0.01, 0.98)
    images = Sampler(model, sampling, CPU, seed=1).images(schedule, 0, 6)
    assert images.shape == (6, 3, 8, 8)
    parts = [
        Sampler(model, sampling, CPU, seed=1, micro_batch=1).images(schedule, i, i + 2) for i in (0, 2, 4)
    ]
    assert (torch.cat(parts).int() - images.int()).abs().max() <= 1
    with pytest.raises(InputError, match=r"sampling\.clip: the state is a latent"):
        DDIM("ddim", 5, respacing="5").plan(model)
    DDIM("ddim", 5, respacing="5", clip=False).plan(model)


def test_a_network_without_pipeline_takes_its_scheduler_from_beside_it_or_from_the_options(
    folders: Any,
) -> None:
    network = folders.unet()
    network.save_pretrained(folders.root)
    with pytest.raises(InputError, match=r"has no scheduler/scheduler_config\.json"):
        load_diffusers(folders.root, {})
    chosen = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    model = load_diffusers(folders.root, {"scheduler": chosen})
    np.testing.assert_array_equal(model.betas, training_betas("cosine", 1000))
    diffusers.DDIMScheduler(num_train_timesteps=500).save_pretrained(folders.root)
    assert len(load_diffusers(folders.root, {}).betas) == 500
    assert len(load_diffusers(folders.root, {"scheduler": {"num_train_timesteps": 200}}).betas) == 200


def test_old_weights_are_read_without_executing_them(folders: Any, tmp_path: Path) -> None:
    network = folders.unet()
    path = folders.pipeline(unet=network)
    eps = load_diffusers(path, {})(X, 400, None).eps
    state = network.state_dict()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, path / "unet" / "diffusion_pytorch_model.bin")  # with the names of old versions, too
    same(load_diffusers(path, {})(X, 400, None).eps, eps)

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"conv_in.weight": Attack()}, path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin .*getattr.*Nothing of it was run"):
        load_diffusers(path, {})
    assert not (tmp_path / "executed").exists()


def test_weights_in_several_files_are_one_network(folders: Any) -> None:
    network = folders.unet()
    path = folders.pipeline(unet=network)
    whole = load_diffusers(path, {})
    shutil.rmtree(path / "unet")
    network.save_pretrained(path / "unet", max_shard_size="100KB")
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    split = load_diffusers(path, {})
    same(split(X, 400, None).eps, whole(X, 400, None).eps)
    assert split.fingerprint != whole.fingerprint  # of the files, not of what is in them
    index.write_text(index.read_text().replace('"diffusion', '"../diffusion'))
    with pytest.raises(InputError, match="names files outside of its folder"):
        load_diffusers(path, {})


def test_the_fingerprint_follows_weights_configurations_and_options(folders: Any) -> None:
    path = folders.pipeline(unet=folders.unet(num_class_embeds=6))
    prints = [
        load_diffusers(path, {}).fingerprint,
        load_diffusers(path, {}).fingerprint,
        load_diffusers(path, {"guidance_scale": 2.0}).fingerprint,
    ]
    folders.unet(seed=1, num_class_embeds=6).save_pretrained(path / "unet")
    prints.append(load_diffusers(path, {}).fingerprint)
    diffusers.DDPMScheduler(beta_end=0.03).save_pretrained(path / "scheduler")
    prints.append(load_diffusers(path, {}).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_loading_leaves_the_random_numbers_of_torch_alone(folders: Any) -> None:
    path = folders.pipeline(unet=folders.unet())
    before = torch.random.get_rng_state()
    load_diffusers(path, {})
    assert torch.equal(before, torch.random.get_rng_state())


def changed(path: Path, **keys: Any) -> None:
    """Writes keys into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _missing(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["conv_in.weight"]
    save_file(state, file)


def _infinite(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + float("inf") for name, value in load_file(file).items()}, file)


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p: shutil.rmtree(p), {}, "there is no folder .*downloads nothing"),
        (lambda p: shutil.rmtree(p / "unet"), {}, r"has no unet/config\.json, transformer/config\.json"),
        (lambda p: changed(p / UNET, _class_name="os.system"), {}, "'os.system' cannot be used"),
        (lambda p: changed(p / UNET, out_channels=5), {}, "5 channels come out of the network, and 3 go in"),
        (lambda p: changed(p / UNET, sample_size=None), {}, r"give model\.options\.sample_size"),
        (
            lambda p: changed(p / UNET, time_embedding_type="fourier"),
            {},
            "'fourier' is not that of a network",
        ),
        (lambda p: changed(p / UNET, quantization_config={"a": 1}), {}, "quantized weights"),
        (lambda p: changed(p / UNET, class_embed_type="identity"), {}, "'identity' is no embedding"),
        (lambda p: changed(p / UNET, block_out_channels=[16, 64]), {}, "unet cannot be loaded"),
        (lambda p: (p / UNET).write_text("{"), {}, "is no JSON file"),
        (lambda p: (p / UNET).write_text("[]"), {}, "holds a list"),
        (lambda p: (p / UNET).write_text("[" * 100_000), {}, "is no JSON file"),
        (lambda p: changed(p / SCHEDULER, prediction_type="flow"), {}, "prediction_type 'flow'"),
        (
            lambda p: changed(p / SCHEDULER, _class_name="ScoreSdeVeScheduler"),
            {},
            "'ScoreSdeVeScheduler' cannot",
        ),
        (lambda p: changed(p / SCHEDULER, rescale_betas_zero_snr=True), {}, "rescale_betas_zero_snr cannot"),
        (
            lambda p: (p / "unet/diffusion_pytorch_model.safetensors").unlink(),
            {},
            "has no diffusion_pytorch_model",
        ),
        (
            lambda p: (p / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            {},
            "cannot be loaded",
        ),
        (_missing, {}, r"the file lacks conv_in\.weight"),
        (_infinite, {}, "holds NaN or infinity"),
        (lambda p: changed(p / UNET, block_out_channels="16"), {}, "unet cannot be loaded"),
        (lambda p: changed(p / UNET, in_channels="3"), {}, "in_channels is '3', not a number"),
        (lambda p: changed(p / UNET, sample_size=[8]), {}, r"sample_size \[8\] is no"),
        (lambda p: None, {"class_embedder": "classes.pt"}, "attends to no context; leave the option out"),
        (lambda p: None, {"guidance_scale": 2.0}, "knows no classes"),
        (lambda p: None, {"sample_size": [8, 8]}, "leave it out"),
        (lambda p: None, {"guidance": 2.0}, "did you mean 'guidance_scale'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    folders: Any, change: Callable[[Path], Any], options: dict[str, Any], message: str
) -> None:
    path = folders.pipeline(unet=folders.unet())
    change(path)
    with pytest.raises(InputError, match=message):
        load_diffusers(path, options)


def test_decoders_that_do_not_fit_are_refused_by_name(folders: Any) -> None:
    path = folders.pipeline(transformer=folders.dit())
    with pytest.raises(InputError, match="no vqvae or vae folder to decode them"):
        load_diffusers(path, {})
    folders.pipeline(vqvae=folders.vq())
    with pytest.raises(InputError, match="decodes 3 channels, the network makes 4"):
        load_diffusers(path, {})
    shutil.rmtree(path / "vqvae")
    folders.pipeline(vae=folders.kl())
    changed(path / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(InputError, match="latents_mean and latents_std"):
        load_diffusers(path, {})
    changed(path / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(InputError, match="'AutoencoderTiny' cannot be used"):
        load_diffusers(path, {})


def test_more_labels_than_the_network_knows_are_refused(folders: Any) -> None:
    path = folders.pipeline(transformer=folders.dit())
    with pytest.raises(InputError, match="the network knows 1000, not 1001"):
        load_diffusers(path, {"num_classes": 1001})


def test_the_size_may_come_from_the_options(folders: Any) -> None:
    path = folders.pipeline(unet=folders.unet(sample_size=None))
    assert load_diffusers(path, {"sample_size": [8, 16]}).shape == (3, 8, 16)
