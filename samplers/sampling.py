"""What a job's `sampling:` section says: one frozen dataclass per solver family, which binds it to a network.

To add a solver: a function as in `samplers.solvers` (and a grid), and here a dataclass whose fields are its keys in
the job file, entered in `Solver`. This is where solvers, guidance and epsilon scaling are put together; none of them
knows the others.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args, get_type_hints

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from samplers import analytic, diffusers_schedulers, ldm, solvers
from samplers.errors import InputError
from samplers.grids import (
    Churn,
    DiscreteGrid,
    Discretization,
    Floats,
    Scaling,
    SigmaGrid,
    TimeSchedule,
    discrete_grid,
    sigma_grid,
    step_count,
)
from samplers.guidance import Gradient, guided
from samplers.models.protocol import BringsScheduler, Converting, Model
from samplers.prediction import Predict
from samplers.scaling import scaled
from samplers.schedule import Schedule
from samplers.solvers import Noise, Variance

Run = Callable[[Predict, Schedule, Tensor, Noise, Gradient | None], Tensor]
"""(network, λ schedule, start state, step noise, classifier gradient) → x0 [B, C, H, W]."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A solver bound to a network's process.

    times[t] is what the network is told at evaluation t. start: a network without a prior of its own is sampled
    from start times standard normal noise. tail(t): the plan of the evaluations t … 0, for sampling that starts with
    its `start` times a state as the network sees it at evaluation t; InputError where it cannot start there. None:
    the solver cannot start anywhere else than at its beginning.
    """

    times: Floats
    run: Run
    start: float = 1.0
    tail: "Callable[[int], Plan] | None" = None


_CLOSED = ConfigDict(extra="forbid")  # a key that the solver does not have is an error in the job file


@dataclass(frozen=True, slots=True)
class DDPM:
    """Ancestral sampling of a discrete-time network; one evaluation per step.

    respacing: guided-diffusion's `timestep_respacing`, default the evenly spaced "NFE". variance: default as the
    checkpoint's flags say. clip: clamp x0 to [-1, 1] (clip_denoised).
    """

    solver: Literal["ddpm"]
    nfe: int
    respacing: str | None = None
    variance: Variance | None = None
    clip: bool = True

    state_dtype: ClassVar[torch.dtype] = torch.float32
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network or the NFE does not fit."""
        _images_only(model, self.clip)
        grid = _discrete(model, self.solver, self.nfe, self.respacing or str(self.nfe))
        variance = self.variance or model.variance
        if variance == "learned_range" and not model.learned_range:
            raise InputError(
                "sampling.variance: learned_range needs a network with learn_sigma; use fixed_large"
            )
        return self._on(grid, variance)

    def _on(self, grid: DiscreteGrid, variance: Variance) -> Plan:
        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            return solvers.ddpm(
                scaled(net, schedule), x, grid, noise, variance=variance, clip=self.clip, gradient=gradient
            )

        return Plan(grid.times, run, tail=lambda t: self._on(grid.tail(t), variance))


@dataclass(frozen=True, slots=True)
class DDIM:
    """DDIM as guided-diffusion has it, η from 0 (deterministic) to 1; one evaluation per step.

    respacing: default "ddimNFE", the official integer stride. A classifier's gradient is folded in as ADM-ES
    does it: what was scaled and guided is divided by λ once more.
    """

    solver: Literal["ddim"]
    nfe: int
    eta: float = 0.0
    respacing: str | None = None
    clip: bool = True

    state_dtype: ClassVar[torch.dtype] = torch.float32
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    def __post_init__(self) -> None:
        solvers.check_eta(self.eta)

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network or the NFE does not fit."""
        _images_only(model, self.clip)
        return self._on(_discrete(model, self.solver, self.nfe, self.respacing or f"ddim{self.nfe}"))

    def _on(self, grid: DiscreteGrid) -> Plan:
        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            predict, clip = scaled(net, schedule), self.clip
            if gradient is not None:
                predict, clip = scaled(guided(predict, gradient, grid, clip=clip), schedule), False
            return solvers.ddim(predict, x, grid, noise, eta=self.eta, clip=clip)

        return Plan(grid.times, run, tail=lambda t: self._on(grid.tail(t)))


@dataclass(frozen=True, slots=True)
class EDM:
    """EDM's Euler and Heun samplers of a sigma-based network, with churn. Heun makes 2·steps − 1 evaluations.

    S_max: default no limit. sigma_min, sigma_max: default those of the discretization, kept within what the network
    was trained for. rule: what λ divides. "paper", as EDM-ES's main sampler: the network's noise at every evaluation,
    both stages of a Heun step. "edm-es-ablation", as its `ablation_sampler` (generate.py with --disc, --schedule or
    --scaling): in a Heun step the first stage only, and with scaling "vp" (x - x0)/sigma of the scaled state x.
    """

    solver: Literal["euler", "heun"]
    nfe: int
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float | None = None
    S_noise: float = 1.0
    discretization: Discretization = "edm"
    schedule: TimeSchedule = "linear"
    scaling: Scaling = "none"
    sigma_min: Annotated[float, Field(gt=0)] | None = None
    sigma_max: Annotated[float, Field(gt=0)] | None = None
    rho: Annotated[float, Field(gt=0)] = 7.0
    rule: Literal["paper", "edm-es-ablation"] = "paper"

    state_dtype: ClassVar[torch.dtype] = torch.float64
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    def __post_init__(self) -> None:
        step_count(self.nfe, self.solver)  # an even NFE of Heun is known to be wrong without any network
        _ = self._churn

    @property
    def _churn(self) -> Churn:
        """Raises InputError for values out of range."""
        most = math.inf if self.S_max is None else self.S_max
        return Churn(self.S_churn, self.S_min, most, self.S_noise)

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network or the NFE does not fit."""
        if model.sigma_range is None:
            raise InputError(f"sampling.solver: {self.solver} needs a sigma-based network; use ddpm or ddim")
        if model.prior is not None and self.scaling != "none":
            raise InputError("sampling.scaling: this network starts from a prior of its own; use none")
        grid = sigma_grid(
            self.nfe,
            method=self.solver,
            discretization=self.discretization,
            schedule=self.schedule,
            scaling=self.scaling,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            rho=self.rho,
            churn=self._churn,
            limits=model.sigma_range,
            round_sigma=model.round_sigma,
        )
        return self._on(grid)

    def _on(self, grid: SigmaGrid) -> Plan:
        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            if self.rule == "paper":
                predict = solvers.change_of_variables(scaled(net, schedule), grid)
            else:
                first = schedule.first_stages() if self.solver == "heun" else schedule
                predict = scaled(solvers.change_of_variables(net, grid), first)
            return solvers.edm(predict, x, grid, noise)

        return Plan(grid.times, run, grid.start, lambda t: self._on(grid.tail(t)))


@dataclass(frozen=True, slots=True)
class Analytic:
    """What the two samplers of Analytic-DPM have in common; λ does not touch Γ (ms_eps).

    variance: "analytic" needs Γ: `ms_eps` is its file (an official .pth or one of ours), else Γ is estimated from
    `ms_eps_images` images of the dataset. clip_sigma_idx, clip_pixel: see `analytic.clipped`. shift1: the network
    counts timesteps from 0; false for those that Analytic-DPM's own code trained.
    """

    solver: str
    nfe: int
    variance: str = "analytic"
    spacing: analytic.Spacing = "linear"
    clip_sigma_idx: Annotated[int, Field(ge=0)] = 0
    clip_pixel: Annotated[float, Field(ge=0)] = 2.0
    shift1: bool = True
    ms_eps: str | None = None
    ms_eps_images: Annotated[int, Field(ge=1)] = analytic.MS_EPS_IMAGES

    state_dtype: ClassVar[torch.dtype] = torch.float32
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    @property
    def lacks_ms_eps(self) -> bool:
        """Γ has still to be estimated; its file is then given by `with_ms_eps`."""
        return self.variance == "analytic" and self.ms_eps is None

    def with_ms_eps(self, file: Path) -> Self:
        """The same sampling with the file of Γ."""
        return replace(self, ms_eps=str(file))

    def _grid(self, model: Model) -> analytic.AnalyticGrid:
        betas = _betas(model, self.solver)
        _require_no_classifier(model, self.solver)
        if model.shape != model.image_shape:
            raise InputError(
                f"sampling.solver: {self.solver} clamps what it samples to [-1, 1], which holds for images and not "
                "for the latents of this network; use ldm_ddim"
            )
        try:
            return analytic.analytic_grid(betas, self.nfe, spacing=self.spacing, shift1=self.shift1)
        except InputError as error:
            raise InputError(f"sampling.nfe: {error}") from None

    def _statistics(self, grid: analytic.AnalyticGrid) -> analytic.Statistics | None:
        if self.variance != "analytic" or self.ms_eps is None:
            return None
        try:
            return analytic.read_ms_eps(Path(self.ms_eps), grid.levels)
        except InputError as error:
            raise InputError(f"sampling.ms_eps: {error}") from None

    def _clipped(self, variance: Floats, grid: analytic.AnalyticGrid) -> Floats:
        try:
            return analytic.clipped(
                variance, grid, clip_sigma_idx=self.clip_sigma_idx, clip_pixel=self.clip_pixel
            )
        except InputError as error:
            raise InputError(f"sampling.{error}") from None


@dataclass(frozen=True, slots=True)
class AnalyticDDPM(Analytic):
    """Ancestral sampling as Analytic-DPM's code has it; one evaluation per step.

    clip: clamp x0 to [-1, 1]; it can be left out with the fixed variances only.
    """

    solver: Literal["analytic_ddpm"]
    variance: analytic.Variance = "analytic"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.variance == "analytic" and not self.clip:
            raise InputError("clip: false needs variance fixed_small or fixed_large")

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network, the NFE or Γ does not fit. Γ may be missing until `run`."""
        grid = self._grid(model)
        # Without Γ the rest is checked all the same, before an hour goes into the estimate.
        kind = "fixed_small" if self.lacks_ms_eps else self.variance
        variance = self._clipped(analytic.ddpm_variance(grid, kind, self._statistics(grid)), grid)

        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            assert not self.lacks_ms_eps, "Γ is estimated before sampling"
            return analytic.ddpm(scaled(net, schedule), x, grid, noise, variance=variance, clip=self.clip)

        return Plan(grid.times, run)


@dataclass(frozen=True, slots=True)
class AnalyticDDIM(Analytic):
    """DDIM as Analytic-DPM's code has it. Not deterministic for η = 0 either: Γ adds variance.

    variance "ddim": η alone decides, Γ is not needed, and no step is clipped.
    """

    solver: Literal["analytic_ddim"]
    variance: Literal["analytic", "ddim"] = "analytic"
    clip_pixel: Annotated[float, Field(ge=0)] = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        solvers.check_eta(self.eta)
        if self.variance == "ddim" and self.clip_sigma_idx:
            raise InputError("clip_sigma_idx needs variance analytic")

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network, the NFE or Γ does not fit. Γ may be missing until `run`."""
        grid = self._grid(model)
        variance = self._clipped(analytic.ddim_variance(grid, self.eta, self._statistics(grid)), grid)

        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            assert not self.lacks_ms_eps, "Γ is estimated before sampling"
            return analytic.ddim(scaled(net, schedule), x, grid, noise, variance=variance, eta=self.eta)

        return Plan(grid.times, run)


@dataclass(frozen=True, slots=True)
class LDM:
    """LDM's DDIM of a latent (or any discrete-time) network; one evaluation per step.

    ddim_steps: LDM's S, default NFE. It makes more than S evaluations where S does not divide the training's
    timesteps; then nfe says how many, and ddim_steps what LDM is asked for. Classifier-free guidance is no matter of
    the solver: a network that has it predicts the guided noise, and λ divides that.
    """

    solver: Literal["ldm_ddim"]
    nfe: int
    eta: float = 0.0
    temperature: float = 1.0
    ddim_steps: Annotated[int, Field(ge=1)] | None = None

    state_dtype: ClassVar[torch.dtype] = torch.float32
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    def __post_init__(self) -> None:
        solvers.check_eta(self.eta)
        ldm.check_temperature(self.temperature)

    def plan(self, model: Model) -> Plan:
        """Raises InputError where the network or the NFE does not fit."""
        betas = _betas(model, self.solver)
        _require_no_classifier(model, self.solver)
        steps = self.nfe if self.ddim_steps is None else self.ddim_steps
        key = "nfe" if self.ddim_steps is None else "ddim_steps"
        try:
            grid = ldm.latent_grid(betas, steps)
        except InputError as error:
            raise InputError(f"sampling.{key}: {error}") from None
        if grid.nfe != self.nfe:
            raise InputError(
                f"sampling.{key}: LDM makes {grid.nfe} evaluations when it is asked for {steps} steps; "
                f"write nfe: {grid.nfe} and ddim_steps: {steps}"
            )

        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            return ldm.ddim(scaled(net, schedule), x, grid, noise, eta=self.eta, temperature=self.temperature)

        return Plan(grid.times, run)


@dataclass(frozen=True, slots=True)
class Diffusers:
    """A scheduler of the diffusers library (an optional dependency) on a discrete-time network.

    scheduler: the class's name, default the one that the model's folder names. options: keys of its configuration
    that override the folder's, and `eta` for DDIM and TCD; β and the kind of prediction are the network's. nfe counts
    network evaluations: with n steps, Heun and KDPM2 make 2n - 1.

    What λ divides is the predicted noise, after guidance and after the conversion from v or x0, at every evaluation;
    the scheduler is built for noise predictions and gets the scaled noise.
    """

    solver: Literal["diffusers"]
    nfe: Annotated[int, Field(ge=1)]
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    state_dtype: ClassVar[torch.dtype] = torch.float32
    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    def plan(self, model: Model) -> Plan:
        """Raises InputError where diffusers is missing, or the network, scheduler, options or NFE do not fit."""
        betas = _betas(model, self.solver)
        _require_no_classifier(model, self.solver)
        config = model.scheduler_config if isinstance(model, BringsScheduler) else {}
        name = self.scheduler or config.get("_class_name")
        if name is None:
            raise InputError(
                "sampling.scheduler is missing: name a class, such as DPMSolverMultistepScheduler"
            )
        prepared = diffusers_schedulers.prepare(
            name, config, self.options, betas, self.nfe, learned_range=model.learned_range
        )

        def run(
            net: Predict, schedule: Schedule, x: Tensor, noise: Noise, gradient: Gradient | None
        ) -> Tensor:
            if isinstance(model, Converting):
                levels = [model.level(time) for time in prepared.times.tolist()]
                net = diffusers_schedulers.at_level(net, model.answers, levels, prepared)
            return diffusers_schedulers.run(prepared, scaled(net, schedule), x, noise)

        return Plan(prepared.times, run, prepared.start)


Solver: TypeAlias = DDPM | DDIM | EDM | AnalyticDDPM | AnalyticDDIM | LDM | Diffusers
"""Any of the solvers with its options."""

Sampling = Annotated[Solver, Field(discriminator="solver")]

SOLVERS: tuple[str, ...] = tuple(
    name for kind in get_args(Solver) for name in get_args(get_type_hints(kind)["solver"])
)
"""What `solver` may say in a job file."""


def with_parameters(sampling: Solver, parameters: Mapping[str, float]) -> Solver:
    """The same solver with some of its numbers replaced. Raises InputError for a number that it does not have, or that
    is out of its range."""
    for name in parameters:
        if name == "nfe" or not isinstance(getattr(sampling, name, None), float):
            numbers = [f.name for f in fields(sampling) if isinstance(getattr(sampling, f.name), float)]
            raise InputError(
                f"{name} is no number of {sampling.solver}; it has {', '.join(numbers) or 'none'}"
            )
    changed: Any = dict(parameters)  # names are checked above, which the type of `replace` cannot see
    return replace(sampling, **changed)


def _images_only(model: Model, clip: bool) -> None:
    if clip and model.image_shape != model.shape:
        raise InputError(
            "sampling.clip: the state is a latent, which is not limited to [-1, 1]; set clip: false"
        )


def _betas(model: Model, solver: str) -> Floats:
    if model.betas is None:
        raise InputError(f"sampling.solver: {solver} needs a discrete-time network; use euler or heun")
    return model.betas


def _require_no_classifier(model: Model, solver: str) -> None:
    if model.gradient is not None:
        raise InputError(f"sampling.solver: {solver} takes no guidance by a classifier; use ddpm or ddim")


def _discrete(model: Model, solver: str, nfe: int, respacing: str) -> DiscreteGrid:
    betas = _betas(model, solver)
    try:
        grid = discrete_grid(betas, respacing)
    except InputError as error:
        raise InputError(f"sampling.nfe: {error}") from None
    if grid.nfe != nfe:
        raise InputError(f"sampling.respacing: {respacing!r} makes {grid.nfe} evaluations, but nfe is {nfe}")
    return grid
