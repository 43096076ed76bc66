"""Schedulers of the diffusers library as solvers: equal to the library's own loop, and random only by our noise."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import diffusers_schedulers, ldm
from samplers.diffusers_schedulers import SCHEDULERS, Prepared
from samplers.errors import InputError
from samplers.generate import Sampler
from samplers.models.diffusers_folder import DiffusersModel, load_diffusers
from samplers.models.ideal import IdealModel, PointCloud
from samplers.models.process import Process
from samplers.prediction import Prediction, to_epsilon
from samplers.sampling import DDIM, DDPM, Diffusers
from samplers.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's, about numpy

CPU = torch.device("cpu")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 8, 8)
PARAMETERS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
STOCHASTIC = {
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
UNKNOWN_TO_LIBRARY = {
    ("EulerAncestralDiscreteScheduler", "x0"),
    ("KDPM2AncestralDiscreteScheduler", "x0"),
    ("KDPM2DiscreteScheduler", "x0"),
    ("PNDMScheduler", "x0"),
}
"""Schedulers that take x0 from a network through us only."""


def tiny(x: Tensor, time: float) -> Tensor:
    """A network's answer in closed form, of magnitude 1, which depends on state and time."""
    return torch.tanh(x.flip(-1) * 0.7 + 0.3 * x + np.cos(time / 300)) * 0.8


class Tiny:
    """`tiny` as a model whose answer is of a given kind."""

    gradient = prior = round_sigma = sigma_range = None
    learned_range = False
    time = "discrete"
    num_classes = None

    def __init__(self, answers: str = "epsilon", **betas: Any) -> None:
        self.answers = answers
        self.scheduler_config = {"_class_name": "DDIMScheduler", **BETAS, **betas}
        full = diffusers_schedulers.full_config(self.scheduler_config, "test")
        self.process = Process(betas=diffusers_schedulers.config_betas(full, "test"))
        self.betas = self.process.betas
        self.level = self.process.coefficients

    def __call__(self, x: Tensor, time: float, labels: Tensor | None) -> Prediction:
        return Prediction(to_epsilon(self.answers, tiny(x, time), x, *self.level(time)))


def draws(shape: tuple[int, ...] = SHAPE, seed: int = 7) -> tuple[Tensor, Callable[[int], Tensor]]:
    """What a generator of that seed gives: the start, and then one noise after another as a loop asks for it."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=numbers), lambda t: torch.randn(shape, generator=numbers)


def ours(
    model: Any, sampling: Any, schedule: Schedule | None = None, shape: tuple[int, ...] = SHAPE
) -> Tensor:
    """The final state of our solver."""
    plan = sampling.plan(model)
    start, noise = draws(shape)
    one = schedule or Schedule.uniform(sampling.nfe, 1.0)
    return plan.run(lambda x, t: model(x, float(plan.times[t]), None), one, plan.start * start, noise, None)


def library(
    name: str,
    parameter: str,
    steps: int,
    network: Callable[[Tensor, float], Tensor],
    lambdas: Callable[[int, int], float] | None = None,
    eta: float | None = None,
    **config: Any,
) -> Tensor:
    """The loop of the library's pipelines; λ by hand in it: answer → noise / λ → answer, at the scheduler's level."""
    scheduler = getattr(diffusers, name)(**BETAS, prediction_type=parameter, **config)
    scheduler.set_timesteps(steps)
    numbers = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=numbers) * scheduler.init_noise_sigma
    further: dict[str, Any] = {} if eta is None else {"eta": eta}
    if "generator" in inspect.signature(scheduler.step).parameters:
        further["generator"] = numbers
    for i, time in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, time)
        out = network(given, float(time))
        if lambdas is not None:
            lam = lambdas(i, len(scheduler.timesteps))
            if hasattr(scheduler, "sigmas"):
                sigma = float(scheduler.sigmas[scheduler.step_index or 0])
                a, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
            else:
                abar = float(scheduler.alphas_cumprod[int(time)])
                a, s = abar**0.5, (1 - abar) ** 0.5
            if parameter == "epsilon":
                out = out / lam
            elif parameter == "sample":
                out = (given - s * ((given - a * out) / s) / lam) / a
            else:
                eps = (a * out + s * given) / lam
                out = a * eps - s * (given - s * eps) / a
        x = scheduler.step(out, time, x, **further).prev_sample
    return x


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.dtype == torch.float32
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale)


def fitting(name: str) -> tuple[int, int]:
    """NFE, and the number of steps that makes it."""
    if name.startswith(("Heun", "KDPM2")):
        return 19, 10
    return (23, 14) if name == "PNDMScheduler" else (10, 10)


@pytest.mark.parametrize("answers", PARAMETERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_equals_the_library_s_loop_for_every_prediction_type(name: str, answers: str) -> None:
    nfe, steps = fitting(name)
    got = ours(Tiny(answers), Diffusers("diffusers", nfe, name))
    assert torch.isfinite(got).all()
    if (name, answers) in UNKNOWN_TO_LIBRARY:
        with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
            library(name, PARAMETERS[answers], steps, tiny)
        return
    wanted = library(name, PARAMETERS[answers], steps, tiny)  # converts in the scheduler, not before it
    if (name, answers) == ("PNDMScheduler", "v"):
        # There the library extrapolates v and converts the sum with the last state; ours extrapolates the noise.
        assert (got - wanted).abs().max() > 0.01
        return
    close(got, wanted, 5e-6)  # measured: 3e-6 for DEIS, else below 1e-6


@pytest.mark.parametrize("answers", PARAMETERS)
@pytest.mark.parametrize(
    ("name", "config", "eta"),
    [
        ("DPMSolverMultistepScheduler", {}, None),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, None),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, None),
        ("UniPCMultistepScheduler", {}, None),
        ("HeunDiscreteScheduler", {}, None),
        ("EulerDiscreteScheduler", {}, None),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, None),
        ("DDIMScheduler", {"clip_sample": False}, 1.0),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 0.0),
    ],
)
def test_scaling_equals_scaling_by_hand_in_the_library_s_loop(
    name: str, config: dict[str, Any], eta: float | None, answers: str
) -> None:
    nfe, steps = fitting(name)
    schedule = Schedule.linear(nfe, 0.002, 0.99)
    wanted = library(
        name, PARAMETERS[answers], steps, tiny, lambda i, n: schedule.lambdas[n - 1 - i], eta, **config
    )
    options = config | ({} if eta is None else {"eta": eta})
    sampling = Diffusers("diffusers", nfe, name, options)
    got = ours(Tiny(answers), sampling, schedule)
    close(got, wanted, 5e-6)  # measured: 3e-6 for DEIS, else below 1e-6
    assert float((got - ours(Tiny(answers), sampling)).abs().max()) > 1e-3  # and λ does something


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_ours_alone_and_keyed_to_the_image(name: str) -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (20, 3, 4, 4))
    betas = Tiny().betas
    model: Any = IdealModel(PointCloud(points), Process(betas=betas))
    nfe, _ = fitting(name)
    sampling = Diffusers("diffusers", nfe, name, {"eta": 1.0} if name == "DDIMScheduler" else {})
    schedule = Schedule.uniform(nfe, 1.01)
    before = torch.random.get_rng_state()
    whole = Sampler(model, sampling, CPU, seed=3, micro_batch=4).images(schedule, 5, 11).int()
    single = Sampler(model, sampling, CPU, seed=3, micro_batch=1)
    parts = torch.cat([single.images(schedule, i, i + 1) for i in range(5, 11)]).int()
    assert (whole - parts).abs().max() <= 1  # float32 rounding at a pixel's edge
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", [*sorted(STOCHASTIC), "DDIMScheduler"])
def test_a_stochastic_scheduler_uses_the_noise_that_it_is_given(name: str) -> None:
    nfe, _ = fitting(name)
    plan = Diffusers("diffusers", nfe, name, {"eta": 1.0} if name == "DDIMScheduler" else {}).plan(Tiny())
    asked: list[int] = []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return torch.zeros(SHAPE)

    model = Tiny()
    start, other = draws()
    one = Schedule.uniform(nfe, 1.0)
    silent = plan.run(lambda x, t: model(x, plan.times[t], None), one, plan.start * start, noise, None)
    loud = plan.run(lambda x, t: model(x, plan.times[t], None), one, plan.start * start, other, None)
    assert asked == sorted(set(asked), reverse=True)
    assert asked
    assert (silent - loud).abs().max() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_nothing_in_the_loop_reads_the_state_s_device(name: str) -> None:
    nfe, _ = fitting(name)
    prepared = diffusers_schedulers.prepare(name, {}, {}, Tiny().betas, nfe, learned_range=False)
    x = torch.empty(
        SHAPE, device="meta"
    )  # without data: whoever asks for a number of it, or copies it, fails
    out = diffusers_schedulers.run(
        prepared, lambda x, t: Prediction(x * 0.1), x, lambda t: torch.empty_like(x)
    )
    assert out.device.type == "meta"


class Fake:
    """A scheduler of two steps that does what `act` says."""

    sigmas = None

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act
        self.timesteps = torch.tensor([500, 0])

    def scale_model_input(self, x: Tensor, time: Tensor) -> Tensor:
        return x

    def step(self, eps: Tensor, time: Tensor, x: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.act(x),)


def fake(act: Callable[[Tensor], Tensor]) -> Tensor:
    """The run of a `Fake` whose noise at evaluation t is t + 1 everywhere."""
    levels = np.full(2, 0.5)
    prepared = Prepared("Fake", lambda: Fake(act), np.array([0.0, 500]), levels, levels, 1.0, False, {})
    return diffusers_schedulers.run(
        prepared, lambda x, t: Prediction(x), torch.zeros(SHAPE), lambda t: torch.full(SHAPE, t + 1.0)
    )


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.randn(x.shape),
        lambda x: x + torch.randn(x.shape, generator=torch.Generator()),
        lambda x: x + torch.randn_like(x),
        lambda x: x + diffusers.utils.torch_utils.randn_tensor(x.shape, device=x.device, dtype=x.dtype),
    ],
)
def test_one_draw_of_normal_numbers_per_step_is_replaced(act: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(fake(act), torch.full(SHAPE, 3.0))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: torch.randn_like(x) + torch.randn_like(x),
        lambda x: x + torch.randn(1),
        lambda x: torch.rand_like(x),
        lambda x: torch.empty_like(x).normal_(),
        lambda x: torch.normal(x, 1.0),
        lambda x: x + torch.randint(0, 9, ()),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: x[torch.randperm(len(x))],
        lambda x: torch.nn.functional.dropout(x + 1),
    ],
)
def test_any_other_randomness_is_an_error(act: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="Fake draws random numbers"):
        fake(act)


def test_the_variance_channels_go_to_a_scheduler_that_wants_them(folders: Any) -> None:
    config = BETAS | {"variance_type": "learned_range", "clip_sample": False}
    model = load_diffusers(folders.pipeline(unet=folders.unet(out_channels=6), config=config), {})
    network: Any = model.network
    with torch.no_grad():
        wanted = library(
            "DDPMScheduler",
            "epsilon",
            10,
            lambda x, time: network(x, time).sample,
            variance_type="learned_range",
            clip_sample=False,
        )
    close(ours(model, Diffusers("diffusers", 10)), wanted, 5e-6)
    # and our own ancestral solver is the same, on the same timesteps
    own = DDPM("ddpm", 10, respacing="ddim10", clip=False)
    close(ours(model, own), wanted, 5e-6)
    assert torch.isfinite(ours(model, Diffusers("diffusers", 10, "UniPCMultistepScheduler"))).all()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_equals_the_library_s_pipeline(folders: Any, variance: str) -> None:
    path = folders.pipeline(unet=folders.unet(), config={"variance_type": variance})
    model = load_diffusers(path, {})
    assert model.variance == variance
    pipe = diffusers.DDPMPipeline(
        unet=model.network, scheduler=diffusers.DDPMScheduler.from_pretrained(path / "scheduler")
    )
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(2, torch.Generator().manual_seed(7), 10, output_type="np").images
    for sampling in (Diffusers("diffusers", 10), DDPM("ddpm", 10, respacing="ddim10")):
        final = ours(model, sampling)
        close((final / 2 + 0.5).clamp(0, 1), torch.from_numpy(wanted).permute(0, 3, 1, 2), 2e-5)
    images = pipe(2, torch.Generator().manual_seed(7), 10).images
    got = model.pixels(ours(model, Diffusers("diffusers", 10))).permute(0, 2, 3, 1).numpy()
    for mine, theirs in zip(got, images, strict=True):
        assert np.abs(mine.astype(int) - np.asarray(theirs).astype(int)).max() <= 1
        assert np.mean(mine == np.asarray(theirs)) > 0.99


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_the_library_s_pipeline_where_its_direction_follows_the_clipped_image(
    folders: Any, eta: float
) -> None:
    path = folders.pipeline(unet=folders.unet(), scheduler="DDIMScheduler")
    model = load_diffusers(path, {})
    pipe = diffusers.DDIMPipeline(
        unet=model.network, scheduler=diffusers.DDIMScheduler.from_pretrained(path / "scheduler")
    )
    pipe.set_progress_bar_config(disable=True)

    def pipeline(rederived: bool) -> Tensor:
        wanted = pipe(
            2,
            torch.Generator().manual_seed(7),
            eta,
            10,
            use_clipped_model_output=rederived,
            output_type="np",
        )
        return torch.from_numpy(wanted.images).permute(0, 3, 1, 2)

    final = ours(model, DDIM("ddim", 10, eta=eta))
    close((final / 2 + 0.5).clamp(0, 1), pipeline(True), 2e-5)
    final = ours(model, Diffusers("diffusers", 10, options={"eta": eta}))
    close((final / 2 + 0.5).clamp(0, 1), pipeline(False), 2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ldm_s_ddim_is_the_library_s_with_its_offset_and_last_step(eta: float) -> None:
    options = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    model = Tiny()
    grid = ldm.latent_grid(model.betas, 20)
    start, noise = draws()
    wanted = ldm.ddim(lambda x, t: model(x, grid.times[t], None), start, grid, noise, eta=eta)
    sampling = Diffusers("diffusers", 20, "DDIMScheduler", options | {"eta": eta})
    np.testing.assert_array_equal(sampling.plan(model).times, grid.times)
    close(ours(model, sampling), wanted, 1e-5)


def test_a_folder_s_settings_carry_over_to_another_scheduler() -> None:
    model = Tiny(timestep_spacing="trailing")
    trailing = Diffusers("diffusers", 10, "EulerDiscreteScheduler").plan(model).times
    assert trailing[-1] == 999
    assert Diffusers("diffusers", 10, "EulerDiscreteScheduler", {"timestep_spacing": "leading"}).plan(
        model
    ).times[-1] == pytest.approx(900)


def test_a_network_of_another_format_names_its_scheduler() -> None:
    model: Any = IdealModel(PointCloud(np.zeros((1, 1, 2, 2))), Process(betas=Tiny().betas))
    with pytest.raises(InputError, match=r"sampling\.scheduler is missing"):
        Diffusers("diffusers", 5).plan(model)
    sampling = Diffusers("diffusers", 5, "DPMSolverMultistepScheduler")
    images = Sampler(model, sampling, CPU).images(Schedule.uniform(5, 1.0), 0, 2)
    assert set(images.flatten().tolist()) <= {127, 128}  # the one point of the data, in ADM's rounding


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            Diffusers("diffusers", 10, "HeunDiscreteScheduler"),
            "cannot make 10 network evaluations; near it 9, 11",
        ),
        (Diffusers("diffusers", 2000), "cannot make 2000 network evaluations; near it 1000"),
        (Diffusers("diffusers", 10, "FlowMatchEulerDiscreteScheduler"), "is for flow matching"),
        (
            Diffusers("diffusers", 10, "DPMSolverSDEScheduler"),
            "'DPMSolverSDEScheduler' cannot be used; the schedulers are",
        ),
        (Diffusers("diffusers", 10, "os"), "'os' cannot be used"),
        (
            Diffusers("diffusers", 10, options={"prediction_type": "sample"}),
            "prediction_type is a matter of the network",
        ),
        (Diffusers("diffusers", 10, options={"beta_start": 0.1}), "beta_start is a matter of the network"),
        (
            Diffusers("diffusers", 10, options={"etta": 1}),
            "DDIMScheduler has no option 'etta'; it has clip_sample",
        ),
        (Diffusers("diffusers", 10, options={"eta": 2}), "eta must lie between 0 and 1"),
        (
            Diffusers("diffusers", 10, "UniPCMultistepScheduler", {"use_flow_sigmas": True}),
            "use_flow_sigmas cannot",
        ),
        (
            Diffusers("diffusers", 10, options={"rescale_betas_zero_snr": True}),
            "rescale_betas_zero_snr cannot",
        ),
        (Diffusers("diffusers", 10, options={"timestep_spacing": "odd"}), "odd"),
        (
            Diffusers("diffusers", 10, "DPMSolverMultistepScheduler", {"solver_type": "odd"}),
            "cannot be built",
        ),
        (
            Diffusers("diffusers", 10, "DDPMScheduler", {"variance_type": "learned_range"}),
            "variance_type learned_range",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(sampling: Diffusers, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampling.plan(Tiny())


def test_sigma_networks_and_classifiers_are_refused() -> None:
    model: Any = IdealModel(PointCloud(np.zeros((1, 1, 2, 2))), Process(sigma_range=(0.002, 80.0)))
    with pytest.raises(InputError, match="needs a discrete-time network"):
        Diffusers("diffusers", 10, "DDIMScheduler").plan(model)
    guided: Any = Tiny()
    guided.gradient = lambda x, time, labels: x
    with pytest.raises(InputError, match="takes no guidance by a classifier"):
        Diffusers("diffusers", 10).plan(guided)


def test_without_the_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"pip install 'lamtune\[diffusers\]'"):
        load_diffusers(tmp_path, {})
    points: Any = IdealModel(PointCloud(np.zeros((1, 1, 2, 2))), Process(betas=np.full(100, 0.02)))
    with pytest.raises(InputError, match=r"pip install 'lamtune\[diffusers\]'"):
        Diffusers("diffusers", 10, "DDIMScheduler").plan(points)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_betas_are_the_library_s_in_float64(schedule: str) -> None:
    for name in ("DDPMScheduler", "DDIMScheduler"):
        if schedule == "sigmoid" and name == "DDIMScheduler":
            continue
        config = {"_class_name": name, "beta_schedule": schedule}
        betas = diffusers_schedulers.config_betas(diffusers_schedulers.full_config(config, "test"), "test")
        assert betas.dtype == np.float64
        library_s = getattr(diffusers, name)(beta_schedule=schedule).betas.double().numpy()
        np.testing.assert_allclose(betas, library_s, rtol=2e-5)
    given = diffusers_schedulers.config_betas({"trained_betas": [0.1, 0.2]}, "test")
    np.testing.assert_array_equal(given, [0.1, 0.2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "laplace", "_class_name": "DDPMScheduler"}, "'laplace' is not known"),
        ({"trained_betas": [0.1, 1.0], "_class_name": "DDPMScheduler"}, "two or more β between 0 and 1"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "for flow matching"),
        ({}, "'None' cannot be used"),
    ],
)
def test_a_noise_schedule_that_is_not_known_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"file: .*{message}"):
        diffusers_schedulers.config_betas(diffusers_schedulers.full_config(config, "file"), "file")


def test_a_model_of_the_library_is_a_model_with_a_scheduler(folders: Any) -> None:
    model = load_diffusers(folders.pipeline(unet=folders.unet(), scheduler="PNDMScheduler"), {})
    assert isinstance(model, DiffusersModel)
    assert model.scheduler_config["_class_name"] == "PNDMScheduler"
    assert Diffusers("diffusers", 23).plan(model).times[-1] == pytest.approx(923, abs=80)
