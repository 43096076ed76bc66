"""Where a solver evaluates the network: discrete timesteps (ADM) and noise levels (EDM), with all that
depends on them alone. Everything is computed on the host in float64 before sampling starts.

Knows nothing of networks (what it needs of one comes in as plain numbers), images or λ. Arrays are read-only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from samplers.errors import InputError

Floats = NDArray[np.float64]
Method = Literal["euler", "heun"]
Discretization = Literal["edm", "vp", "ve", "iddpm"]
TimeSchedule = Literal["linear", "vp", "ve"]
Scaling = Literal["none", "vp"]

BETAS_FROM = ("linear", "cosine")

# The constants of EDM's re-implementations (Karras et al. 2022, table 1): ε_s of VP; C_1, C_2 and M of iDDPM.
VP_END = 1e-3
IDDPM_RATIO, IDDPM_OFFSET, IDDPM_LEVELS = 0.001, 0.008, 1000


# --- discrete timesteps -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Timesteps:
    """The visited timesteps of a discrete-time network, whatever else a solver's grid holds.

    timestep: int64 [nfe], indexed by evaluation t; ascending, so t = 0 is the cleanest.
    """

    timestep: NDArray[np.int64]

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return self.timestep.size

    @property
    def times(self) -> Floats:
        """What the network is told at evaluation t: the original timestep, float64 [nfe].

        A network trained on rescaled timesteps has them rescaled by its adapter.
        """
        return self.timestep.astype(np.float64)


def training_betas(name: str, steps: int) -> Floats:
    """The noise variances β of training, float64 [steps], as guided-diffusion makes them.

    "linear": equally spaced from 0.1/steps to 20/steps, both included. "cosine" (Nichol and Dhariwal 2021):
    min(1 - f((i+1)/steps)/f(i/steps), 0.999) with f(s) = cos²(π/2·(s + 0.008)/1.008).

    Raises InputError for another name, for steps < 2, and for "linear" with fewer than 21 steps (β would
    reach 1).
    """
    if steps < 2:
        raise InputError(f"diffusion_steps must be at least 2, not {steps}")
    if name == "linear":
        betas = np.linspace(1000 / steps * 1e-4, 1000 / steps * 0.02, steps, dtype=np.float64)
        if betas[-1] >= 1:
            raise InputError(f"the linear noise schedule needs at least 21 diffusion_steps, not {steps}")
        return betas
    if name == "cosine":
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - f[1:] / f[:-1], 0.999))
    raise InputError(f"noise_schedule must be one of {', '.join(BETAS_FROM)}, not {name!r}")


def respaced(respacing: str, steps: int) -> NDArray[np.int64]:
    """The original timesteps that sampling visits, ascending, chosen from range(steps).

    "N" or "a,b,c": range(steps) is cut in as many equal sections as there are counts (the first ones are one
    longer where it does not divide), and each section gives `count` equally spaced timesteps, its first and
    last included (a count of 1 gives the first). "ddimN": every s-th timestep from 0 with the smallest s that
    gives N of them; the last timestep is in general not among them. "": all.

    Raises InputError for text that is none of these, and for counts that do not fit; it names nearby ones.
    """
    if not respacing:
        return np.arange(steps)
    if respacing.startswith("ddim"):
        return _strided(_count(respacing[4:], respacing), steps)
    counts = [_count(part, respacing) for part in respacing.split(",")]
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (1 if section < steps % len(counts) else 0)
        if count > size:
            where = "there are" if len(counts) == 1 else f"section {section + 1} of {respacing!r} has"
            raise InputError(
                f"{count} sampling steps were asked, but {where} only {size} timesteps; use {size} or fewer"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # The running sum and Python's half-to-even rounding are guided-diffusion's: other sums round
            # elsewhere.
            kept.append(start + round(position))
            position += stride
        start += size
    if len(kept) < 2:
        raise InputError(
            f"respacing {respacing!r} leaves {len(kept)} timestep(s), none of them noisy; use 2 or more"
        )
    return np.array(kept, dtype=np.int64)


def _count(text: str, respacing: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"timestep respacing must look like '20', '10,6,4' or 'ddim20', not {respacing!r}")
    return int(text)


def _strided(count: int, steps: int) -> NDArray[np.int64]:
    for stride in range(1, steps):
        if -(-steps // stride) == count:
            return np.arange(0, steps, stride)
    possible = sorted({-(-steps // stride) for stride in range(1, steps)})
    near = [n for n in possible if n < count][-2:] + [n for n in possible if n > count][:2]
    raise InputError(
        f"no integer stride through {steps} timesteps gives {count} of them ('ddim{count}'); "
        f"near it {', '.join(f'ddim{n}' for n in near)} work, and so does the evenly spaced form '{count}'"
        if 1 < count <= steps
        else f"'ddim{count}' is not possible with {steps} timesteps; use one of "
        f"{', '.join(f'ddim{n}' for n in near)}"
    )


@dataclass(frozen=True, slots=True, eq=False)
class DiscreteGrid(Timesteps):
    """The diffusion process restricted to the visited timesteps. Arrays are [nfe], indexed by evaluation t.

    beta: variance added between two visited timesteps, 0 < β < 1. abar: Π(1 - β), the signal's share of the
    variance. abar_prev: abar of evaluation t - 1, and 1 at t = 0. All float64.
    """

    beta: Floats
    abar: Floats = field(init=False)
    abar_prev: Floats = field(init=False)

    def __post_init__(self) -> None:
        assert self.timestep.shape == self.beta.shape, "one β per timestep"
        assert self.beta.size > 1, "at least two evaluations"
        assert ((self.beta > 0) & (self.beta < 1)).all(), "each β within 0 .. 1"
        abar = np.cumprod(1 - self.beta)
        object.__setattr__(self, "abar", abar)
        object.__setattr__(self, "abar_prev", np.append(1.0, abar[:-1]))
        for array in (self.timestep, self.beta, self.abar, self.abar_prev):
            array.setflags(write=False)

    @property
    def posterior_variance(self) -> Floats:
        """The variance of q(x_{t-1} | x_t, x_0), β(1 - abar_prev)/(1 - abar) [nfe]; 0 at t = 0."""
        return self.beta * (1 - self.abar_prev) / (1 - self.abar)

    def tail(self, t: int) -> "DiscreteGrid":
        """The same process from evaluation t on, for sampling that starts there. InputError unless 1 <= t < nfe."""
        if not 1 <= t < self.nfe:
            raise InputError(f"sampling can start at evaluation 1 to {self.nfe - 1}, not {t}")
        return DiscreteGrid(self.timestep[: t + 1].copy(), self.beta[: t + 1].copy())


def discrete_grid(betas: Floats, respacing: str) -> DiscreteGrid:
    """The grid of `respaced(respacing, len(betas))` for a network trained with `betas` (float64 [steps]).

    The new β are 1 - abar/abar_previous over the kept timesteps (iDDPM, Nichol and Dhariwal 2021); everything
    else follows from them. Raises InputError for a β outside (0, 1), and as `respaced` does.
    """
    if not ((betas > 0) & (betas < 1)).all():
        raise InputError("every β of the noise schedule must lie between 0 and 1")
    kept = respaced(respacing, len(betas))
    abar = np.cumprod(1 - betas)[kept]
    return DiscreteGrid(kept, 1 - abar / np.append(1.0, abar[:-1]))


# --- noise levels -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Churn:
    """EDM's added noise (Karras et al. 2022, algorithm 2): S_churn, S_min, S_max and S_noise.

    Where s_min <= sigma <= s_max, a step first raises its noise level by the factor
    1 + min(amount/steps, sqrt(2) - 1), with noise of standard deviation `noise` in place of 1.

    Raises InputError unless amount and noise are finite and >= 0, and 0 <= s_min <= s_max.
    """

    amount: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("S_churn", self.amount), ("S_noise", self.noise)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be finite and at least 0, not {value}")
        if not 0 <= self.s_min <= self.s_max:
            raise InputError(
                f"S_min and S_max must satisfy 0 <= S_min <= S_max, not {self.s_min}, {self.s_max}"
            )


@dataclass(frozen=True, slots=True)
class SigmaStep:
    """One step of `solvers.edm`: x ← stretch·x + noise·z with standard normal z, then x ← x + length·slope.

    The slope is that of evaluation t, corrected by evaluation t - 1 where `corrected`; length is a difference
    of the solver's time, below 0.
    """

    t: int
    stretch: float
    noise: float
    length: float
    corrected: bool


@dataclass(frozen=True, slots=True, eq=False)
class SigmaGrid:
    """The steps of `solvers.edm` and, per evaluation t, what it multiplies there. Arrays are float64 [nfe].

    The solver's state is x = s·(x0 + sigma·eps). Its ODE is dx/dt = drift·x + gain·eps, in which eps stands
    for (x - x0)/sigma with x as the solver has it: for s = 1 the network's noise; else see
    `solvers.change_of_variables`.

    times: the sigma that the network is told (the raised one where a step churns). scale: s there, 1 unless
    the scaling is "vp". start: sampling starts at start·(standard normal), start = sigma·s of the first
    level. alpha: where in the step the correction is evaluated, 1 = at its end (Heun).
    """

    steps: tuple[SigmaStep, ...]
    times: Floats
    scale: Floats
    drift: Floats
    gain: Floats
    start: float
    alpha: float

    def __post_init__(self) -> None:
        for array in (self.times, self.scale, self.drift, self.gain):
            assert array.shape == (self.nfe,), array.shape
            if not np.isfinite(array).all():
                raise InputError(
                    "the noise levels leave the range of float64; bring sigma_min and sigma_max nearer"
                )
            array.setflags(write=False)

    @property
    def nfe(self) -> int:
        """The number of network evaluations."""
        return self.times.size

    def tail(self, t: int) -> "SigmaGrid":
        """The same steps from that of evaluation t on, for sampling that starts there with a state at times[t]:
        where that step churns, its noise has been added. InputError unless a step begins with evaluation t."""
        steps = [step for step in self.steps if step.t <= t]
        if not 0 <= t < self.nfe or steps[0].t != t:
            begins = ", ".join(str(step.t) for step in reversed(self.steps))
            raise InputError(f"sampling can start where a step begins, at evaluation {begins}, not {t}")
        steps[0] = replace(steps[0], stretch=1.0, noise=0.0)
        return SigmaGrid(
            steps=tuple(steps),
            times=self.times[: t + 1].copy(),
            scale=self.scale[: t + 1].copy(),
            drift=self.drift[: t + 1].copy(),
            gain=self.gain[: t + 1].copy(),
            start=float(self.scale[t]),
            alpha=self.alpha,
        )


def default_sigma_range(discretization: Discretization) -> tuple[float, float]:
    """(sigma_min, sigma_max) that EDM's code uses for a discretisation unless told otherwise."""
    match discretization:
        case "edm":
            return 0.002, 80.0
        case "ve":
            return 0.02, 100.0
        case "iddpm":
            return 0.002, 81.0
        case "vp":
            process = _Vp(19.9, 0.1)
            return float(process.sigma(np.array(VP_END))), float(process.sigma(np.array(1.0)))
    raise InputError(f"discretization must be one of edm, vp, ve, iddpm, not {discretization!r}")


def sigma_levels(
    discretization: Discretization, count: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Floats:
    """`count` falling noise levels from sigma_max to sigma_min, float64 [count]; for count 1 just sigma_max.

    Karras et al. 2022, equation 5 ("edm") and table 1 (others). The 0 that ends sampling is not among them.

    Raises InputError where "iddpm", which picks from a fixed list, has fewer than `count` in the range.
    """
    part = np.arange(count) / max(count - 1, 1)
    match discretization:
        case "edm":
            top, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
            return np.asarray((top + part * (end - top)) ** rho)
        case "ve":
            return np.asarray(np.sqrt(sigma_max**2 * (sigma_min**2 / sigma_max**2) ** part))
        case "vp":
            return _Vp.through(sigma_min, sigma_max).sigma(1 + part * (VP_END - 1))
        case "iddpm":
            levels = _iddpm_levels()
            levels = levels[(levels >= sigma_min) & (levels <= sigma_max)]
            if count > levels.size:
                raise InputError(
                    f"the iddpm discretization has {levels.size} noise levels from {sigma_min} to "
                    f"{sigma_max}, but {count} steps were asked; use {levels.size} or fewer"
                )
            return np.asarray(levels[np.rint(part * (levels.size - 1)).astype(np.int64)])
    raise InputError(f"discretization must be one of edm, vp, ve, iddpm, not {discretization!r}")


def _iddpm_levels() -> Floats:
    """The 1001 noise levels u_0 > ... > u_1000 = 0 of iDDPM's cosine schedule (float64 [1001]).

    The official code gets abar in float32 (an integer tensor times a Python float), which moves the levels
    by a relative 3e-7; its published results were made so, and so are ours, to 4e-7.
    """
    j = np.arange(IDDPM_LEVELS + 1, dtype=np.float32)
    quarter = np.float32(math.pi / 2) * j / np.float32(IDDPM_LEVELS) / np.float32(1 + IDDPM_OFFSET)
    # NumPy's float32 sine differs between processors in the last digit; the rounded float64 one does not.
    abar = np.sin(quarter.astype(np.float64)).astype(np.float32) ** 2
    ratio = np.maximum(abar[:-1] / abar[1:], np.float32(IDDPM_RATIO)).astype(np.float64)
    levels = np.zeros(IDDPM_LEVELS + 1)
    for index in range(IDDPM_LEVELS, 0, -1):
        levels[index - 1] = math.sqrt((levels[index] ** 2 + 1) / ratio[index - 1] - 1)
    return levels


@dataclass(frozen=True, slots=True)
class _Linear:
    """sigma = t."""

    def sigma(self, t: Floats) -> Floats:
        return t

    def time(self, sigma: Floats) -> Floats:
        return sigma

    def slope(self, t: Floats) -> Floats:
        return np.ones_like(t)


@dataclass(frozen=True, slots=True)
class _Ve:
    """sigma = sqrt(t)."""

    def sigma(self, t: Floats) -> Floats:
        return np.asarray(np.sqrt(t))

    def time(self, sigma: Floats) -> Floats:
        return sigma**2

    def slope(self, t: Floats) -> Floats:
        return 0.5 / np.asarray(np.sqrt(t))


@dataclass(frozen=True, slots=True)
class _Vp:
    """sigma = sqrt(exp(β_d·t²/2 + β_min·t) - 1)."""

    beta_d: float
    beta_min: float

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float) -> "_Vp":
        """The process with sigma(VP_END) = sigma_min and sigma(1) = sigma_max."""
        low, high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
        beta_d = 2 * (low / VP_END - high) / (VP_END - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Floats) -> Floats:
        return np.asarray(np.sqrt(np.exp(self.beta_d * t**2 / 2 + self.beta_min * t) - 1))

    def time(self, sigma: Floats) -> Floats:
        root = np.sqrt(self.beta_min**2 + 2 * self.beta_d * np.log(1 + sigma**2))
        return np.asarray((root - self.beta_min) / self.beta_d)

    def slope(self, t: Floats) -> Floats:
        sigma = self.sigma(t)
        return np.asarray((self.beta_min + self.beta_d * t) / 2 * (sigma + 1 / sigma))


def step_count(nfe: int, method: Method) -> int:
    """The steps of `nfe` evaluations: as many for "euler", (nfe + 1)/2 for "heun", whose last step is an
    Euler step.

    Raises InputError for nfe < 1, an even nfe with "heun", or another method.
    """
    if nfe < 1:
        raise InputError(f"nfe must be at least 1, not {nfe}")
    if method == "euler":
        return nfe
    if method != "heun":
        raise InputError(f"the EDM solver is 'euler' or 'heun', not {method!r}")
    if nfe % 2 == 0:
        near = f"{nfe - 1} or {nfe + 1}"
        raise InputError(
            f"nfe: Heun's method makes 2·steps - 1 evaluations, so {nfe} is impossible; use {near}"
        )
    return (nfe + 1) // 2


def sigma_grid(
    nfe: int,
    *,
    method: Method = "heun",
    discretization: Discretization = "edm",
    schedule: TimeSchedule = "linear",
    scaling: Scaling = "none",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    alpha: float = 1.0,
    churn: Churn | None = None,
    limits: tuple[float, float] = (0.0, math.inf),
    round_sigma: Callable[[Floats], Floats] | None = None,
) -> SigmaGrid:
    """The grid of `nfe` evaluations of EDM's sampler (Karras et al. 2022, algorithms 1 and 2).

    It has the general form of EDM's `ablation_sampler`; the defaults are those of `edm_sampler`.

    sigma_min, sigma_max: None for the discretisation's own; both are kept within `limits`, what the network
    was trained for. schedule: sigma as a function of the solver's time. scaling: "vp" keeps the state's
    variance near 1 with s = 1/sqrt(1 + sigma²). alpha in (0, 1]. round_sigma: the nearest noise levels that
    the network knows, for float64 arrays [n]. nfe = 1 is one Euler step from sigma_max to 0.

    Raises InputError for values that have no grid, naming the ones nearby that do.
    """
    count = step_count(nfe, method)
    churn = churn or Churn()
    low, high = default_sigma_range(discretization)
    low = max(low if sigma_min is None else sigma_min, limits[0])
    high = min(high if sigma_max is None else sigma_max, limits[1])
    if not 0 < low < high < math.inf:
        raise InputError(
            f"sigma_min {low} and sigma_max {high} (kept within the network's {limits[0]} .. {limits[1]}) "
            f"must satisfy 0 < sigma_min < sigma_max"
        )
    if not 0 < alpha <= 1:
        raise InputError(f"alpha must lie above 0 and not above 1, not {alpha}")
    if not 0 < rho < math.inf:
        raise InputError(f"rho must be finite and above 0, not {rho}")
    known = round_sigma or (lambda sigma: sigma)
    process = _process(schedule, low, high)
    with np.errstate(over="ignore", invalid="ignore"):
        levels = sigma_levels(discretization, count, low, high, rho)
        falling = (np.diff(levels) < 0).all() and (np.diff(process.time(levels)) < 0).all()
    if not falling:
        raise InputError(
            f"the vp discretization or schedule cannot run from sigma {high} down to {low}; lower sigma_min"
        )
    begin = process.time(known(levels))
    end = np.append(begin[1:], 0.0)
    level = process.sigma(begin)
    churned = (churn.s_min <= level) & (level <= churn.s_max)
    raised = level * (1 + np.where(churned, min(churn.amount / count, math.sqrt(2) - 1), 0.0))
    # Where nothing is raised the level is the grid's own; inverting it twice would only add rounding.
    first = np.where(raised > level, process.time(known(raised)), begin)
    length = end - first
    noise = churn.noise * np.sqrt(np.maximum(process.sigma(first) ** 2 - level**2, 0.0))

    heun = method == "heun"
    moments = np.empty(nfe)
    moments[:: 2 if heun else 1] = first[::-1]
    if heun:
        moments[1::2] = (first + alpha * length)[-2::-1]
    sigma = process.sigma(moments)
    slope = process.slope(moments)
    scale = _scale(scaling, sigma)
    # s'/s = -sigma·sigma'·s² for s = 1/sqrt(1 + sigma²).
    shrink = -sigma * slope * scale**2 if scaling == "vp" else np.zeros(nfe)
    before, after = _scale(scaling, level), _scale(scaling, process.sigma(first))
    steps = tuple(
        SigmaStep(
            t=(2 if heun else 1) * (count - 1 - i),
            stretch=float(after[i] / before[i]),
            noise=float(noise[i] * after[i]),
            length=float(length[i]),
            corrected=heun and i < count - 1,
        )
        for i in range(count)
    )
    return SigmaGrid(
        steps=steps,
        times=sigma,
        scale=scale,
        drift=slope * (1 - scale) / sigma + shrink,
        gain=slope * scale,
        start=float(level[0] * before[0]),
        alpha=alpha,
    )


def _process(schedule: TimeSchedule, sigma_min: float, sigma_max: float) -> _Linear | _Ve | _Vp:
    match schedule:
        case "linear":
            return _Linear()
        case "ve":
            return _Ve()
        case "vp":
            return _Vp.through(sigma_min, sigma_max)
    raise InputError(f"schedule must be one of linear, vp, ve, not {schedule!r}")


def _scale(scaling: Scaling, sigma: Floats) -> Floats:
    match scaling:
        case "none":
            return np.ones_like(sigma)
        case "vp":
            return 1 / np.asarray(np.sqrt(1 + sigma**2))
    raise InputError(f"scaling must be none or vp, not {scaling!r}")
