"""Uses a schedule that was found: divides the noise that somebody else's sampling code predicts.

    from samplers.apply import load_schedule, scaled_pipeline
    with scaled_pipeline(pipeline, load_schedule("best.json")):
        images = pipeline(num_inference_steps=20).images

`scaled_pipeline` is for a pipeline or a scheduler of the diffusers library, `scaled_network` for any network that
is called as network(x, t, …). Both count the evaluations themselves, from t = nfe - 1 (the noisiest) down to 0,
begin again after each run, refuse a run with another number of evaluations, and leave everything as it was when
the block ends. Knows nothing of lamtune's own solvers and models: what it is given need not come from here.
"""

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from samplers.diffusers_schedulers import rehearsed, scheduler_class
from samplers.errors import InputError
from samplers.schedule import Schedule

Kind = Literal["epsilon", "x0", "v"]
Level = tuple[float, float]
"""alpha and sigma of x = alpha·x0 + sigma·eps, x as the network sees it."""

_KINDS: Mapping[str, Kind] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_HALF = (torch.float16, torch.bfloat16)
_Network = TypeVar("_Network", bound=Callable[..., Any])


def load_schedule(path: str | Path) -> Schedule:
    """The schedule in a file that `lamtune export --format json` wrote.

    Raises InputError, naming the file, where it cannot be read or has no usable list `lambdas`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return Schedule(tuple(content["lambdas"]), content.get("k"), content.get("b"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no schedule (a mapping with a list `lambdas`): {error!r}") from None


def divided(kind: Kind, output: Tensor, x: Tensor, lam: float, level: Level | None) -> Tensor:
    """What a network would have answered to x if the noise that it implies were divided by lam.

    output: its answer of the given kind (see `samplers.prediction.to_epsilon`), of x's shape. For "epsilon" it is
    output/lam and needs no level; x0 becomes x0/lam + (1 - 1/lam)·x/alpha; v, with alpha² + sigma² = s²,
    v/lam - (1 - 1/lam)·sigma/(alpha·s)·x.
    """
    if kind == "epsilon":
        return output / lam
    assert level is not None, "the caller has refused x0 and v without levels"
    alpha, sigma = level
    kept = 1 - 1 / lam
    if kind == "x0":
        return output / lam + (kept / alpha) * x
    return output / lam - (kept * sigma / (alpha * math.hypot(alpha, sigma))) * x


class _Evaluations:
    """Counts the evaluations of a run: `next` gives t = nfe - 1 … 0, and begins again after 0."""

    def __init__(self, nfe: int, calls_per_evaluation: int = 1) -> None:
        self._nfe, self._per = nfe, calls_per_evaluation
        self._calls = 0

    def next(self) -> int:
        """The t of one more call."""
        t = self._nfe - 1 - self._calls // self._per
        self._calls = (self._calls + 1) % (self._nfe * self._per)
        return t

    @property
    def at_start(self) -> bool:
        """No run has begun, or the last one is complete."""
        return self._calls == 0

    def finish(self) -> None:
        """The run is over: raises InputError unless it had as many calls as it should."""
        done, self._calls = self._calls, 0
        if done:
            times = "" if self._per == 1 else f" of {self._per} calls each"
            raise InputError(
                f"the schedule is for {self._nfe} network evaluations{times}, but a run ended after "
                f"{done} call(s): sample with {self._nfe}, or search a schedule for what you sample with"
            )


# --- networks -----------------------------------------------------------------------------------------------


@contextmanager
def scaled_network(
    network: _Network,
    schedule: Schedule,
    *,
    prediction: Kind = "epsilon",
    levels: Sequence[Level] | None = None,
    calls_per_evaluation: int = 1,
) -> Iterator[_Network]:
    """Inside, what `network` answers is as if the noise in it had been divided by λ_t.

    network: called as network(x, t, …) with x [B, C, H, W]. A torch module is changed in place (by a forward hook), so
    that sampling code that holds it needs no change; of another callable the block gets a changed version:

        with scaled_network(net, schedule) as net:
            x = my_sampler(net, noise)

    It answers with a tensor, or a tuple or `.sample` whose first part is one. Where that has twice the channels of x,
    the second half is a learned variance and is left alone. prediction: what it answers with. levels[t]: alpha and
    sigma at evaluation t, needed for x0 and v; for a denoiser D(x, sigma) of EDM: x0 with levels (1, sigma).
    calls_per_evaluation: where the code calls the network several times at one evaluation, as for guidance by two
    calls, or a batch in parts. Guidance is linear, so dividing both of its halves by λ divides the guided noise, which
    is what lamtune searches.

    Images are those of lamtune's own sampling with the same solver, start and noise, bit for bit on one device, where
    the network is given the solver's state itself. The division is done in the dtype of the state if that is the
    finer one, and so is the answer: half precision would round λ away.

    Raises InputError: levels that are missing or do not fit; states of half precision; at the end of the block, runs
    of another length than the schedule's (but for whole multiples of it, which look like so many runs).
    """
    if prediction not in _KINDS.values():
        raise InputError(f"a network predicts {', '.join(_KINDS.values())}, not {prediction!r}")
    if calls_per_evaluation < 1:
        raise InputError(f"calls_per_evaluation must be at least 1, not {calls_per_evaluation}")
    if prediction != "epsilon" and (levels is None or len(levels) != schedule.nfe):
        raise InputError(
            f"levels: {schedule.nfe} pairs of alpha and sigma, one per evaluation, are needed to scale the noise "
            f"in a prediction of {prediction}, not {0 if levels is None else len(levels)}"
        )
    evaluations = _Evaluations(schedule.nfe, calls_per_evaluation)

    def scale(x: Tensor, answer: Any) -> Any:
        t = evaluations.next()
        level = None if levels is None else levels[t]
        dtype = torch.promote_types(_first(answer).dtype, x.dtype)
        if dtype in _HALF:
            raise InputError(
                f"the state and the network's answer are both {dtype}, whose rounding is as large as λ - 1: keep the "
                "state in float32 (torch.autocast does)"
            )

        def change(part: Tensor) -> Tensor:
            return divided(prediction, part.to(dtype), x.to(dtype), schedule.lambdas[t], level)

        return _with_first(answer, _first_half(_first(answer), x, change))

    if isinstance(network, nn.Module):
        hook = network.register_forward_hook(
            lambda module, args, kwargs, answer: scale(_state(module.forward, args, kwargs), answer),
            with_kwargs=True,
        )
        try:
            yield network
        finally:
            hook.remove()
    else:

        @functools.wraps(network)
        def changed(*args: Any, **kwargs: Any) -> Any:
            return scale(_state(network, args, kwargs), network(*args, **kwargs))

        yield changed  # type: ignore[misc]  # a callable of the same signature
    evaluations.finish()


def _state(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call, whether it was named or not."""
    x = args[0] if args else kwargs.get(next(iter(inspect.signature(function).parameters)))
    if not isinstance(x, Tensor):
        raise InputError("the network was called without a tensor x as its first argument")
    return x


def _first(answer: Any) -> Tensor:
    part = answer[0] if isinstance(answer, tuple) else getattr(answer, "sample", answer)
    if not isinstance(part, Tensor):
        raise InputError(f"the network answered with a {type(answer).__name__}, in which no tensor was found")
    return part


def _with_first(answer: Any, part: Tensor) -> Any:
    """`answer` with `part` where `_first` found its tensor."""
    if isinstance(answer, Tensor):
        return part
    if isinstance(answer, tuple):
        return (part, *answer[1:])
    answer.sample = part
    return answer


def _first_half(output: Tensor, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`output` with its prediction changed: all of it, or the first of two halves of its channels."""
    if output.shape == x.shape:
        return change(output)
    channels = x.shape[1]
    if output.shape != (x.shape[0], 2 * channels, *x.shape[2:]):
        raise InputError(
            f"the network answered x of shape {list(x.shape)} with {list(output.shape)}; a prediction has the shape "
            "of x, or twice its channels with a learned variance"
        )
    return torch.cat([change(output[:, :channels]), output[:, channels:]], dim=1)


# --- diffusers ----------------------------------------------------------------------------------------------


@contextmanager
def scaled_pipeline(pipeline: Any, schedule: Schedule) -> Iterator[Any]:
    """Inside, the scheduler of a diffusers pipeline divides the noise that it is handed by λ_t.

    pipeline: one with a `scheduler`, or a scheduler itself where the loop is your own. The network is not touched, so
    it may be compiled, offloaded or quantized. The scheduler gets the noise after classifier-free guidance, which is
    what lamtune scales; guidance is linear, so scaling both of its halves would be the same. One `step` is one
    evaluation: Heun and KDPM2 have 2n - 1 for n inference steps. Predictions of x0 and v are scaled through the noise
    that they imply at the scheduler's own noise level; of a learned variance only the noise half is scaled.

    Raises InputError: a scheduler that does not step along predicted noise (flow matching, …); timesteps that make
    another number of evaluations, when they are set; a run that does not begin at the first of them (image to image
    with a strength below 1), or ends before the last.
    """
    scheduler = getattr(pipeline, "scheduler", pipeline)
    name = type(scheduler).__name__
    scheduler_class(name, "pipeline.scheduler")
    kind = _KINDS.get(scheduler.config.prediction_type)
    if kind is None:
        raise InputError(
            f"pipeline.scheduler: prediction_type {scheduler.config.prediction_type!r} is none of {', '.join(_KINDS)}"
        )
    original_step, original_set = scheduler.step, scheduler.set_timesteps
    evaluations = _Evaluations(schedule.nfe)
    first: list[float] = []  # the timestep that a run begins at; empty before one is known
    levels: list[Level | None] = []

    def prepare() -> None:
        made = len(scheduler.timesteps)
        if made != schedule.nfe:
            raise InputError(
                f"the schedule is for {schedule.nfe} network evaluations, but {name} makes {made} with these "
                "timesteps: change num_inference_steps, or search a schedule for what you sample with"
            )
        first[:] = [float(scheduler.timesteps[0])]
        levels[:] = [None] * made if kind == "epsilon" else _levels(scheduler)

    @functools.wraps(original_set)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        evaluations.finish()
        result = original_set(*args, **kwargs)
        prepare()
        return result

    @functools.wraps(original_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not first:
            prepare()  # they were set before the block
        # One look at the device per run, not per step.
        if evaluations.at_start and float(timestep) != first[0]:
            raise InputError(
                f"the run begins at timestep {float(timestep):g} and not at the first, {first[0]:g}: a schedule is for "
                "whole runs (image to image: strength 1)"
            )
        t = evaluations.next()
        seen = sample if kind == "epsilon" else scheduler.scale_model_input(sample, timestep)
        half = model_output.dtype if model_output.dtype in _HALF else None
        if half is not None:  # in which λ would be rounded away
            model_output, seen = model_output.float(), seen.float()
        scaled = _first_half(
            model_output, sample, lambda part: divided(kind, part, seen, schedule.lambdas[t], levels[t])
        )
        result = original_step(scaled, timestep, sample, *args, **kwargs)
        return result if half is None else _cast(result, half)

    scheduler.step, scheduler.set_timesteps = step, set_timesteps
    try:
        yield pipeline
    finally:
        del scheduler.step, scheduler.set_timesteps  # the class's own are there again
    evaluations.finish()


def _cast(result: Any, dtype: torch.dtype) -> Any:
    """The next sample of a step in the pipeline's dtype."""
    if isinstance(result, tuple):
        return (result[0].to(dtype), *result[1:])
    result.prev_sample = result.prev_sample.to(dtype)
    return result


def _levels(scheduler: Any) -> list[Level | None]:
    """alpha and sigma at each evaluation of a scheduler whose timesteps are set; index 0 is the last one."""
    trial = deepcopy(scheduler)
    vars(trial).pop("step", None)
    vars(trial).pop("set_timesteps", None)
    trial.timesteps = trial.timesteps.cpu()
    if hasattr(trial, "set_begin_index"):
        trial.set_begin_index(0)
    name = type(scheduler).__name__
    takes_v = name == "DDPMScheduler" and str(trial.config.variance_type).startswith("learned")
    _, alpha, sigma = rehearsed(trial, name, takes_v, {})
    return list(zip(alpha.tolist(), sigma.tolist(), strict=True))
