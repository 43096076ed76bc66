"""Runs a scheduler of the diffusers library as a solver of our networks, with our noise.

The scheduler is built for the network's own β and for ε prediction, whatever the network answers, so that what it
is handed is the scaled noise itself. Knows nothing of λ (the `predict` it gets is scaled already), folders or labels.

diffusers is an optional dependency: `library` is the one place that imports it.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samplers.errors import InputError
from samplers.grids import Floats, training_betas
from samplers.prediction import Predict, Prediction

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""The schedulers of a discrete-time network (training betas, ε prediction) whose only randomness is `step`'s noise."""

_OF_THE_NETWORK = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
}


def library() -> Any:
    """The module diffusers. Raises InputError where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise InputError(f"diffusers is needed ({error}): pip install 'lamtune[diffusers]'") from None
    return diffusers


def scheduler_class(name: str, key: str) -> Any:
    """The class of that name, one of SCHEDULERS; `key` begins the InputError where it is none."""
    if "Flow" in name:
        raise InputError(
            f"{key}: {name} is for flow matching, whose networks predict a velocity along a straight path; "
            "there is no noise prediction to scale"
        )
    if name not in SCHEDULERS:
        raise InputError(f"{key}: {name!r} cannot be used; the schedulers are {', '.join(SCHEDULERS)}")
    return getattr(library(), name)


def full_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a scheduler_config.json says, with the defaults of its class filled in.

    Raises InputError, beginning with `source`, where epsilon scaling has no meaning: flow matching, and a process
    whose last step is pure noise (there x0 cannot be had from the noise).
    """
    kind = scheduler_class(str(config.get("_class_name")), source)
    try:
        full = {**kind.from_config(dict(config)).config}
        full.pop(
            "_use_default_values", None
        )  # a list of keys that from_config would ignore, whatever they say
    except Exception as error:  # the library checks values as it builds, with errors of many types
        raise InputError(f"{source}: {kind.__name__} cannot be built: {error}") from error
    for key, why in (
        ("use_flow_sigmas", "flow matching has no noise prediction to scale"),
        (
            "rescale_betas_zero_snr",
            "the last timestep is pure noise, and x0 does not follow from the scaled noise there",
        ),
    ):
        if full.get(key):
            raise InputError(f"{source}: {key} cannot be used: {why}")
    return full


def config_betas(config: Mapping[str, Any], source: str) -> Floats:
    """The training β of a full configuration: float64 [num_train_timesteps] from its formula or its list.

    The library has them in float32. Raises InputError that begins with `source`.
    """
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    else:
        name, steps = config["beta_schedule"], config["num_train_timesteps"]
        low, high = config["beta_start"], config["beta_end"]
        if name == "linear":
            betas = np.linspace(low, high, steps, dtype=np.float64)
        elif name == "scaled_linear":
            betas = np.linspace(low**0.5, high**0.5, steps, dtype=np.float64) ** 2
        elif name == "squaredcos_cap_v2":
            betas = training_betas("cosine", steps)
        elif name == "sigmoid":
            betas = (high - low) / (1 + np.exp(-np.linspace(-6, 6, steps))) + low
        else:
            raise InputError(f"{source}: beta_schedule {name!r} is not known; give trained_betas instead")
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise InputError(f"{source}: two or more β between 0 and 1 are needed")
    return betas


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A scheduler with its timesteps chosen. Arrays are float64 [nfe], indexed by evaluation t.

    make: a fresh scheduler; they keep a state, so every run has its own. times: what the network is told, fractional
    where a scheduler works in sigma. alpha, sigma: the noise level that the scheduler takes the network's input to
    have. start: what multiplies standard normal noise at the beginning. takes_v: `step` wants the variance channels
    too. arguments: further ones of `step`.
    """

    name: str
    make: Callable[[], Any]
    times: Floats
    alpha: Floats
    sigma: Floats
    start: float
    takes_v: bool
    arguments: Mapping[str, Any]


def prepare(
    name: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    betas: Floats,
    nfe: int,
    *,
    learned_range: bool,
) -> Prepared:
    """The scheduler `name` with as many steps as make `nfe` evaluations of the network.

    config: a scheduler_config.json that came with the network, possibly of another class; {} if none did. options:
    override it, keys of the class's constructor, and `eta` where its `step` takes one (DDIM, TCD). It is tried once
    on zeros, so what the library refuses is known before sampling. Raises InputError.
    """
    texts = (json.dumps(dict(part), sort_keys=True, default=list) for part in (config, options))
    return _prepared(name, *texts, betas.tobytes(), nfe, learned_range)


@lru_cache(maxsize=64)
def _prepared(name: str, config: str, options: str, betas: bytes, nfe: int, learned_range: bool) -> Prepared:
    kind = scheduler_class(name, "sampling.scheduler")
    chosen: dict[str, Any] = json.loads(options)
    arguments = _step_arguments(kind, chosen)
    _check_names(kind, chosen)
    merged = {**json.loads(config), **chosen, "_class_name": name}
    full = full_config(
        {key: value for key, value in merged.items() if key not in _OF_THE_NETWORK}, "sampling.options"
    )
    takes_v = full.get("variance_type") in ("learned", "learned_range") and name == "DDPMScheduler"
    if takes_v and not (learned_range and full["variance_type"] == "learned_range"):
        raise InputError(
            f"sampling.options: variance_type {full['variance_type']} does not fit the network, which "
            f"predicts {'a range' if learned_range else 'no variance'}; use fixed_small or fixed_large"
        )
    values = np.frombuffer(betas)
    full |= {
        "num_train_timesteps": len(values),
        "trained_betas": values.tolist(),
        "prediction_type": "epsilon",
    }
    if "variance_type" in full and not takes_v and name != "DDPMScheduler":
        full["variance_type"] = None  # only says that the network's extra channels are to be cut off

    try:
        fresh = kind.from_config(full)
    except Exception as error:
        raise InputError(f"sampling.scheduler: {name} cannot be built: {error}") from error

    def build(steps: int) -> Any:
        scheduler = deepcopy(fresh)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it searches the timesteps, which may occur twice
        return scheduler

    steps = _steps(build, name, nfe)
    try:
        scheduler = build(steps)
        start = float(scheduler.init_noise_sigma)
        times, alpha, sigma = rehearsed(deepcopy(scheduler), name, takes_v, arguments)
        return Prepared(name, lambda: deepcopy(scheduler), times, alpha, sigma, start, takes_v, arguments)
    except InputError:
        raise
    except Exception as error:  # of whatever type the library's own checks and arithmetic raise
        raise InputError(
            f"sampling.scheduler: {name} fails with {nfe} evaluations: {type(error).__name__}: {error}"
        ) from error


def _step_arguments(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Takes `eta` out of the options where it belongs to `step`."""
    if "eta" not in options or "eta" not in inspect.signature(kind.step).parameters:
        return {}
    eta = options.pop("eta")
    if not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise InputError(f"sampling.options.eta must lie between 0 and 1, not {eta!r}")
    return {"eta": float(eta)}


def _check_names(kind: Any, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    for key in options:
        if key in _OF_THE_NETWORK:
            raise InputError(f"sampling.options: {key} is a matter of the network; leave it out")
        if key not in known:
            names = ", ".join(sorted(known - _OF_THE_NETWORK))
            raise InputError(f"sampling.options: {kind.__name__} has no option {key!r}; it has {names}")


def _steps(build: Callable[[int], Any], name: str, nfe: int) -> int:
    """The number of steps that makes `nfe` evaluations. Raises InputError naming numbers that work."""
    calls: dict[int, int] = {}
    reason = ""
    # one evaluation a step; two but for the last (Heun, KDPM2); one more (PLMS); Runge-Kutta in the first three (PNDM)
    for guess in (nfe, nfe // 2 + 1, nfe - 1, nfe - 9):
        for steps in (guess, guess - 1, guess + 1):
            if steps < 1 or steps in calls:
                continue
            try:
                calls[steps] = len(build(steps).timesteps)
            except Exception as error:  # too many or too few steps for it
                reason = reason or f" ({error})"
                continue
            if calls[steps] == nfe:
                return steps
    near = sorted(set(calls.values()), key=lambda n: (abs(n - nfe), n))[:4]
    hint = f"; near it {', '.join(map(str, sorted(near)))} work" if near else reason
    raise InputError(f"sampling.nfe: {name} cannot make {nfe} network evaluations{hint}")


def rehearsed(
    scheduler: Any, name: str, takes_v: bool, arguments: Mapping[str, Any]
) -> tuple[Floats, Floats, Floats]:
    """times, alpha and sigma of the evaluations, from a run on zeros of one pixel, which uses the scheduler up."""
    times = scheduler.timesteps.double().numpy()
    shape = (1, 1, 1, 1)
    x, out = torch.zeros(shape), torch.zeros(1, 2 if takes_v else 1, 1, 1)
    alpha, sigma = np.empty(len(times)), np.empty(len(times))
    for i, time in enumerate(scheduler.timesteps):
        shrunk = scheduler.scale_model_input(torch.ones(shape, dtype=torch.float64), time).item()
        if not hasattr(scheduler, "sigmas"):
            abar = float(scheduler.alphas_cumprod[int(time)])
            alpha[i], sigma[i] = abar**0.5, (1 - abar) ** 0.5
        else:
            level = _level(scheduler, i, shrunk)
            alpha[i], sigma[i] = (1 + level**2) ** -0.5, level * (1 + level**2) ** -0.5
        with _KeyedNoise(lambda: torch.zeros(shape), x, name):
            x = scheduler.step(out, time, x, return_dict=False, **arguments)[0]
    if not torch.isfinite(x).all():
        raise InputError(f"sampling.scheduler: {name} gives NaN or infinity with {len(times)} evaluations")
    return times[::-1].copy(), alpha[::-1].copy(), sigma[::-1].copy()


def _level(scheduler: Any, i: int, shrunk: float) -> float:
    """sigma/alpha of evaluation i, in which the network's input is `shrunk` times the scheduler's state.

    A state that is not shrunk belongs to sigma i. For others the factor 1/sqrt(1 + sigma²) is float32 and says little
    about a small sigma, but enough to find it among those that the scheduler has (KDPM2 has two lists).
    """
    known: Floats = scheduler.sigmas.double().numpy()
    if shrunk == 1 and scheduler.init_noise_sigma == 1:
        return float(known[i])
    if hasattr(scheduler, "sigmas_interpol"):
        between = scheduler.sigmas_interpol.double().numpy()
        known = np.concatenate([known, between[np.isfinite(between)]])
    return float(known[np.abs(known - (shrunk**-2 - 1) ** 0.5).argmin()])


@torch.no_grad()
def run(prepared: Prepared, predict: Predict, x: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
    """The scheduler's loop. x: start [B, C, H, W] float32, prepared.start times standard normal. Returns x0.

    predict(x, t) gets the state as networks of alpha² + sigma² = 1 know it, also from schedulers that keep x0 +
    sigma·eps. The noise that is added after evaluation t is noise(t). Timesteps and coefficients stay on the host;
    the library itself waits for the device in UniPC of order 3 (torch.linalg.solve, and small copies to the device).
    """
    scheduler = prepared.make()
    last = len(prepared.times) - 1
    for i, time in enumerate(scheduler.timesteps):
        t = last - i
        eps, v = predict(scheduler.scale_model_input(x, time), t)
        if prepared.takes_v:
            assert v is not None, "prepare() has seen a network with a learned range"
            eps = torch.cat([eps, v], dim=1)
        with _KeyedNoise(lambda t=t: noise(t), x, prepared.name):  # type: ignore[misc]
            x = scheduler.step(eps, time, x, return_dict=False, **prepared.arguments)[0]
    return x


class _KeyedNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the one draw of standard normal numbers that a step may make is ours, and any other randomness an error.

    It watches the operations of torch that are tagged as random, so nothing depends on how a scheduler asks for its
    numbers, and a scheduler that asked in another way could not make images depend on a generator's state.
    """

    def __init__(self, draw: Callable[[], Tensor], like: Tensor, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draw: Callable[[], Tensor] | None = draw
        self._like, self._name = like, name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.randn:
            shape = tuple(args[0])
        elif func.overloadpacket is torch.ops.aten.randn_like:
            shape = tuple(args[0].shape)
        else:
            shape = ()
        if self._draw is None or shape != tuple(self._like.shape):
            raise InputError(
                f"sampling.scheduler: {self._name} draws random numbers ({func}) other than one noise per step, "
                "so an image would not follow from its number alone; use another scheduler"
            )
        draw, self._draw = self._draw, None
        return draw()


def at_level(predict: Predict, kind: str, told: Sequence[tuple[float, float]], prepared: Prepared) -> Predict:
    """Noise predictions at the scheduler's noise level instead of the one that the network's adapter assumed.

    A network of x0 or v is converted with alpha and sigma. told[t]: those that the adapter took for evaluation t; the
    scheduler's are `prepared`'s, and differ between training timesteps, where each interpolates in its own way, and
    where the network is told a rounded timestep. Both conversions are affine in the network's answer,
    eps = p·answer + q·x, so one follows from the other.
    """
    if kind == "epsilon":
        return predict
    factors = []
    for t in range(len(prepared.times)):
        (p1, q1), (p2, q2) = (
            _affine(kind, *level) for level in (told[t], (prepared.alpha[t], prepared.sigma[t]))
        )
        factors.append((float(p2 / p1), float(q2 - q1 * p2 / p1)))

    def predict_at_level(x: Tensor, t: int) -> Prediction:
        eps, v = predict(x, t)
        return Prediction(factors[t][0] * eps + factors[t][1] * x, v)

    return predict_at_level


def _affine(kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """p and q of eps = p·answer + q·x, for alpha² + sigma² = 1."""
    return (alpha, sigma) if kind == "v" else (-alpha / sigma, 1 / sigma)
