"""samplers.apply: what was searched is what is used, whoever samples, and nothing stays changed."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samplers import noise
from samplers.apply import load_schedule, scaled_network, scaled_pipeline
from samplers.errors import InputError
from samplers.generate import INITIAL_DRAW, Sampler
from samplers.models.diffusers_folder import load_diffusers
from samplers.models.python import load_python
from samplers.sampling import DDIM, DDPM, EDM, Diffusers, Solver
from samplers.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's, about numpy

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
IDS = torch.arange(4)
NETWORK = """
import torch

class Network(torch.nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, channels, 3, padding=1)
        self.dtype_of_x = False

    def forward(self, x, t):
        scale = 1 / (1 + t.to(x.dtype)[:, None, None, None])
        return torch.tanh(self.layer(x) * (1 - scale)) + x * scale
"""


def model(folder: Path, **options: Any) -> Any:
    (folder / "net.py").write_text(NETWORK)
    return load_python("net.py:Network", {"shape": SHAPE, **options}, folder)


def sampled(net: Any, solver: Solver, count: int = 4) -> Tensor:
    """lamtune's solver as a user would run it: the start and the step noise of the ids, no schedule."""
    plan = solver.plan(net)
    start = plan.start * noise.normal(3, IDS[:count], INITIAL_DRAW, net.shape, solver.state_dtype)
    predict = Sampler(net, solver, CPU).network(plan.times, None)
    one = Schedule.uniform(solver.nfe, 1.0)  # divides by 1: no bit changes
    return net.pixels(
        plan.run(
            predict,
            one,
            start,
            lambda t: noise.normal(3, IDS[:count], t + 1, net.shape, solver.state_dtype),
            None,
        )
    )


def searched(net: Any, solver: Solver, schedule: Schedule) -> Tensor:
    return Sampler(net, solver, CPU, seed=3).images(schedule, 0, 4)


@pytest.mark.parametrize(
    ("solver", "time"),
    [
        (DDPM("ddpm", 6), "discrete"),
        (DDIM("ddim", 5, eta=0.5), "discrete"),
        (EDM("euler", 5, S_churn=3), "sigma"),
        (EDM("heun", 7), "sigma"),
    ],
    ids=lambda value: getattr(value, "solver", value),
)
def test_a_schedule_read_from_a_file_gives_the_images_of_the_search_bit_for_bit(
    tmp_path: Path, solver: Solver, time: str
) -> None:
    net = model(tmp_path, time=time, prediction="epsilon")
    schedule = Schedule.linear(solver.nfe, 0.02, 0.9)
    (tmp_path / "best.json").write_text(json.dumps({"lambdas": schedule.lambdas, "k": 0.02, "b": 0.9}))
    with scaled_network(net.network, load_schedule(tmp_path / "best.json")):
        used = sampled(net, solver)
    assert torch.equal(used, searched(net, solver, schedule))
    assert not torch.equal(used, sampled(net, solver))  # and the network is as before


def test_in_three_lines_for_a_loop_of_one_s_own(tmp_path: Path) -> None:
    # Euler steps in float64 as somebody would write them, around a network that works in float32.
    net = model(tmp_path, time="sigma", prediction="epsilon")

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return net.network(x.float(), sigma.float())

    solver, schedule = EDM("euler", 9), Schedule.linear(9, 0.01, 0.95)
    sigmas = [*solver.plan(net).times[::-1].tolist(), 0.0]

    def loop(net: Callable[..., Tensor], x: Tensor) -> Tensor:
        for now, then in pairwise(sigmas):
            x = x + (then - now) * net(x, torch.full((len(x),), now))
        return x

    start = sigmas[0] * noise.normal(3, IDS, INITIAL_DRAW, SHAPE, torch.float64)
    with torch.no_grad(), scaled_network(network, schedule) as scaled:
        images = net.pixels(loop(scaled, start))
    assert torch.equal(images, searched(net, solver, schedule))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("time", ["discrete", "sigma"])
def test_answers_of_other_kinds_are_scaled_through_the_noise_in_them(
    tmp_path: Path, prediction: Any, time: str
) -> None:
    net = model(tmp_path, time=time, prediction=prediction)
    solver: Solver = DDPM("ddpm", 6, clip=False) if time == "discrete" else EDM("heun", 7, sigma_max=20)
    plan, schedule = solver.plan(net), Schedule.linear(solver.nfe, 0.02, 0.9)
    states = torch.randn(solver.nfe, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    predict = Sampler(net, solver, CPU).network(plan.times, None)
    levels = [net.level(time) for time in plan.times.tolist()]
    with torch.no_grad():
        wanted = [predict(states[t], t).eps / schedule.lambdas[t] for t in range(solver.nfe)]
        with scaled_network(net.network, schedule, prediction=prediction, levels=levels):
            got = [predict(states[t], t).eps for t in reversed(range(solver.nfe))][::-1]
    for one, other, (_, sigma) in zip(
        got, wanted, levels, strict=True
    ):  # eps of x0 has rounding divided by sigma
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * (1 + 1 / sigma))


def test_a_learned_variance_is_left_alone() -> None:
    x = torch.randn(2, 3, 4, 4)
    answer = torch.randn(2, 6, 4, 4)
    with scaled_network(lambda x, t: answer, Schedule.uniform(1, 2.0)) as net:
        got = net(x, 5)
    assert torch.equal(got[:, :3], answer[:, :3] / 2)
    assert torch.equal(got[:, 3:], answer[:, 3:])


def test_tuples_and_outputs_of_the_libraries_are_scaled_in_place_of_their_tensor() -> None:
    x = torch.ones(1, 1, 2, 2)
    with scaled_network(lambda x, t: (3 * x, "more"), Schedule.free([1.5, 3.0])) as net:
        assert torch.equal(net(x, 5)[0], x)
        assert net(x=x, t=5)[1] == "more"
    with scaled_network(lambda x, t: SimpleNamespace(sample=3 * x), Schedule.uniform(1, 3.0)) as net:
        assert torch.equal(net(x, 5).sample, x)


def test_evaluations_are_counted_down_and_again_for_the_next_run() -> None:
    schedule = Schedule.free([1.0, 2.0, 4.0])  # t = 0, 1, 2
    with scaled_network(lambda x, t: x, schedule) as net:
        seen = [float(net(torch.full((1, 1, 1, 1), 4.0), 0)) for _ in range(6)]
    assert seen == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]


def test_guidance_by_two_calls_is_the_guided_noise_divided() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.free([0.9, 1.25])

    def network(x: Tensor, t: int, y: float) -> Tensor:
        return torch.sin(x * (1 + t) + y)

    def guided(net: Callable[..., Tensor], t: int) -> Tensor:
        without, given = net(x, t, 0.0), net(x, t, 1.0)
        return without + 3 * (given - without)

    with scaled_network(network, schedule, calls_per_evaluation=2) as net:
        for t in (1, 0):
            torch.testing.assert_close(guided(net, t), guided(network, t) / schedule.lambdas[t])


def called(network: Any, schedule: Schedule, times: int, error: Exception | None = None) -> None:
    with scaled_network(network, schedule):
        for _ in range(times):
            network(torch.ones(1, 1, 1, 1))
        if error is not None:
            raise error


@pytest.mark.parametrize(("calls", "said"), [(4, "4 call"), (1, "1 call"), (7, "2 call")])
def test_a_run_of_another_length_is_refused(calls: int, said: str) -> None:
    module = nn.Identity()
    with pytest.raises(InputError, match=f"for 5 network evaluations, but a run ended after {said}"):
        called(module, Schedule.uniform(5, 1.1), calls)
    assert not module._forward_hooks


def test_the_network_is_restored_after_an_error_too() -> None:
    module = nn.Identity()
    with pytest.raises(RuntimeError, match="theirs"):
        called(module, Schedule.uniform(5, 1.1), 1, RuntimeError("theirs"))
    assert torch.equal(module(torch.ones(1, 1, 1, 1)), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "score"}, "predicts epsilon, x0, v, not 'score'"),
        ({"prediction": "v"}, "levels: 3 pairs .* not 0"),
        ({"prediction": "x0", "levels": [(1.0, 1.0)]}, "levels: 3 pairs .* not 1"),
        ({"calls_per_evaluation": 0}, "at least 1"),
    ],
)
def test_what_a_network_lacks_is_named(options: Any, message: str) -> None:
    with (
        pytest.raises(InputError, match=message),
        scaled_network(nn.Identity(), Schedule.uniform(3, 1), **options),
    ):
        pass


def test_answers_that_are_no_prediction_are_refused() -> None:
    x = torch.ones(1, 3, 4, 4)
    for answer, message in (
        (x[:, :2], r"\[1, 2, 4, 4\]; a prediction"),
        ("text", "a str, in which no tensor"),
    ):
        with (
            pytest.raises(InputError, match=message),
            scaled_network(lambda x, t, answer=answer: answer, Schedule.uniform(1, 1)) as net,
        ):
            net(x, 0)
    with (
        pytest.raises(InputError, match="without a tensor x"),
        scaled_network(lambda x, t: x, Schedule.uniform(1, 1)) as net,
    ):
        net(3, 0)


@pytest.mark.parametrize(
    "text",
    ["{}", "[1, 2]", '{"lambdas": 3}', '{"lambdas": [1, 0]}', "no json", '{"lambdas": [1, 2], "k": 3}'],
)
def test_a_file_without_a_schedule_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(InputError, match=r"best\.json"):
        load_schedule(tmp_path / "best.json")
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        load_schedule(tmp_path / "absent.json")


# --- diffusers ----------------------------------------------------------------------------------------------

SCHEDULE = Schedule.linear(8, 0.01, 0.97)


def own(net: Any, scheduler: str, schedule: Schedule, start: Tensor, labels: Tensor | None = None) -> Tensor:
    """lamtune's final state from the given start, without step noise."""
    plan = Diffusers("diffusers", schedule.nfe, scheduler).plan(net)
    with torch.no_grad():
        return plan.run(
            lambda x, t: net(x, float(plan.times[t]), labels),
            schedule,
            plan.start * start,
            lambda t: torch.zeros_like(start),
            None,
        )


def looped(unet: Any, scheduler: Any, start: Tensor) -> Tensor:
    """The final state of the loop in the library's documentation."""
    x = start * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(answer, t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("scheduler", "steps", "nfe"),
    [
        ("DDIMScheduler", 8, 8),
        ("DPMSolverMultistepScheduler", 8, 8),
        ("UniPCMultistepScheduler", 8, 8),
        ("EulerDiscreteScheduler", 8, 8),
        ("HeunDiscreteScheduler", 4, 7),  # two evaluations per step but for the last
    ],
)
def test_a_loop_of_the_library_ends_where_the_search_did(
    folders: Any, prediction: str, scheduler: str, steps: int, nfe: int
) -> None:
    unet = folders.unet()
    config = {"prediction_type": prediction, "beta_start": 0.0001, "beta_end": 0.02}
    net = load_diffusers(folders.pipeline(unet=unet, scheduler=scheduler, config=config), {})
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    schedule = Schedule.linear(nfe, 0.01, 0.97)
    stepper = getattr(diffusers, scheduler)(**config)
    stepper.set_timesteps(steps)
    plain = looped(unet, stepper, start)
    with scaled_pipeline(stepper, schedule):
        stepper.set_timesteps(steps)
        used = looped(unet, stepper, start)
    wanted = own(net, scheduler, schedule, start)
    largest = float(wanted.abs().max())
    torch.testing.assert_close(used, wanted, rtol=0, atol=1e-4 * largest)
    assert (plain - wanted).abs().max() > 1e-3 * largest
    stepper.set_timesteps(steps)
    assert torch.equal(looped(unet, stepper, start), plain)  # everything is as before
    with (
        pytest.raises(InputError, match=f"for {nfe} network evaluations, but .*: change num_inference_steps"),
        scaled_pipeline(stepper, schedule),
    ):
        stepper.set_timesteps(steps + 1)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_guided_pipeline_gives_the_images_of_the_search(
    folders: Any, scheduler: str, guidance: float
) -> None:
    network, vae = folders.dit(), folders.kl()
    path = folders.pipeline(transformer=network, vae=vae, scheduler=scheduler)
    pipe = diffusers.DiTPipeline(network, vae, getattr(diffusers, scheduler)())
    pipe.set_progress_bar_config(disable=True)
    with scaled_pipeline(pipe, SCHEDULE):
        images = pipe(
            [2, 0, 4], guidance, torch.Generator().manual_seed(5), SCHEDULE.nfe, output_type="np"
        ).images
    used = torch.from_numpy(np.rint(images * 255)).to(torch.uint8)
    start = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    options = {} if guidance == 1 else {"guidance_scale": guidance}
    net = load_diffusers(path, options)
    with torch.no_grad():
        wanted = net.pixels(own(net, scheduler, SCHEDULE, start, torch.tensor([2, 0, 4]))).permute(0, 2, 3, 1)
    assert (used.int() - wanted.int()).abs().max() <= 1
    assert (used == wanted).float().mean() > 0.98


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_scaling_both_halves_in_the_network_is_scaling_the_guided_noise(
    folders: Any, prediction: str
) -> None:
    # Classifier-free guidance outside of the network is linear in the two halves, and its weights sum to 1.
    unet = folders.unet(num_class_embeds=6)
    stepper = diffusers.DDIMScheduler(prediction_type=prediction)
    stepper.set_timesteps(SCHEDULE.nfe)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([5, 5, 1, 2])

    def loop() -> Tensor:
        x = start
        with torch.no_grad():
            for t in stepper.timesteps:
                without, given = unet(torch.cat([x, x]), t, labels).sample.chunk(2)
                x = stepper.step(without + 3 * (given - without), t, x).prev_sample
        return x

    abar = stepper.alphas_cumprod[stepper.timesteps.flip(0)].double()
    levels = [(a**0.5, (1 - a) ** 0.5) for a in abar.tolist()]
    kind = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}[prediction]
    with scaled_network(unet, SCHEDULE, prediction=kind, levels=levels):  # type: ignore[arg-type]
        halves = loop()
    with scaled_pipeline(stepper, SCHEDULE):
        guided = loop()
    torch.testing.assert_close(halves, guided, rtol=1e-4, atol=1e-4)
    assert (loop() - guided).abs().max() > 1e-2


def spied(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[Tensor]:
    """What the scheduler's own step is handed."""
    seen: list[Tensor] = []
    original = kind.step

    def spy(self: Any, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output)
        return original(self, output, *args, **kwargs)

    monkeypatch.setattr(kind, "step", spy)
    return seen


@pytest.mark.parametrize("return_dict", [True, False])
def test_half_precision_does_not_round_the_scaling_away(
    monkeypatch: pytest.MonkeyPatch, return_dict: bool
) -> None:
    seen = spied(monkeypatch, diffusers.DDIMScheduler)
    stepper = diffusers.DDIMScheduler()
    stepper.set_timesteps(1)
    x = torch.randn(1, 3, 4, 4).bfloat16()
    assert torch.equal(x / 1.0005, x)
    with scaled_pipeline(stepper, Schedule.uniform(1, 1.0005)):
        result = stepper.step(x, stepper.timesteps[0], x, return_dict=return_dict)
    assert torch.equal(seen[0], x.float() / 1.0005)
    assert (result.prev_sample if return_dict else result[0]).dtype == torch.bfloat16
    with scaled_network(lambda x, t: x.bfloat16(), Schedule.uniform(1, 1.0005)) as net:  # as under autocast
        assert torch.equal(net(x.float(), 0), x.float() / 1.0005)
    with (
        pytest.raises(InputError, match="both torch.bfloat16, .*: keep the state in float32"),
        scaled_network(lambda x, t: x, Schedule.uniform(1, 1.0005)) as net,
    ):
        net(x, 0)


def test_a_learned_variance_in_the_scheduler_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch, diffusers.DDPMScheduler)
    stepper = diffusers.DDPMScheduler(variance_type="learned_range")
    stepper.set_timesteps(2)
    answer = torch.randn(1, 6, 4, 4)
    x = torch.randn(1, 3, 4, 4)
    with scaled_pipeline(stepper, Schedule.free([2.0, 4.0])):
        for t in stepper.timesteps:
            stepper.step(answer, t, x)
    assert torch.equal(torch.cat(seen)[:, 3:], torch.cat([answer, answer])[:, 3:])
    assert torch.equal(torch.cat(seen)[:, :3], torch.cat([answer / 4, answer / 2])[:, :3])


def stepped(stepper: Any, places: list[int], anew: bool = False) -> None:
    """Steps at those places of the timesteps, and then perhaps sets them again."""
    x = torch.randn(1, 3, 4, 4)
    with scaled_pipeline(stepper, SCHEDULE):
        for place in places:
            stepper.step(x, stepper.timesteps[place], x)
        if anew:
            stepper.set_timesteps(8)


def test_a_pipeline_that_ends_early_or_begins_late_is_refused() -> None:
    stepper = diffusers.DDIMScheduler()
    stepper.set_timesteps(8)
    with pytest.raises(InputError, match="begins at timestep 750 and not at the first, 875"):
        stepped(stepper, [1])
    for anew in (False, True):
        with pytest.raises(InputError, match="a run ended after 3 call"):
            stepped(stepper, [0, 1, 2], anew)
    stepped(stepper, [*range(8), *range(8)], anew=True)  # two runs in one block
    assert "step" not in vars(stepper)


def test_schedulers_without_predicted_noise_are_refused() -> None:
    with (
        pytest.raises(InputError, match="flow matching"),
        scaled_pipeline(SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler()), SCHEDULE),
    ):
        pass
    with (
        pytest.raises(InputError, match="EDMEulerScheduler' cannot be used"),
        scaled_pipeline(diffusers.EDMEulerScheduler(), SCHEDULE),
    ):
        pass
