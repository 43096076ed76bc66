"""What a diagnosis of a network's exposure bias has found, as a value: for the store, for files and for people.

Needs no torch. How it is measured is `search.diagnose`'s matter, how it is drawn that of `plots`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from samplers.errors import InputError
from samplers.schedule import Schedule
from search.report import number


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """Sampling that started at evaluation t from a real image's state: the distance of its images."""

    t: int
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Sampling with one schedule. Lists are indexed by evaluation t, 0 the last and cleanest.

    norms: mean ‖ε‖₂ of the network's answers, before λ divides them. ratios: to those in training; above 1 where
    exposure bias shows. deltas: δ_t, see `objectives.states`. distance: of the images, as in a search.
    """

    name: str
    k: float | None
    b: float | None
    lambdas: tuple[float, ...]
    norms: tuple[float, ...]
    ratios: tuple[float, ...]
    deltas: tuple[float, ...]
    distance: float
    late: tuple[Late, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was measured. Lists are indexed by evaluation t, 0 the last and cleanest.

    times: what the network is told (timestep or sigma). alpha, sigma: of x = alpha·x0 + sigma·eps, the state that it
    sees. form: of δ_t. training: mean ‖ε‖₂ on real images with fresh noise. floor: δ_t of as many states of the
    forward process, which is what no schedule can fall below. real_images: whose moments stand for the data.
    model_fingerprint, sampling: of the network and all options of the solver, as a job in the store has them.
    """

    model: str
    model_fingerprint: str
    dataset: str
    sampling: Mapping[str, Any]
    solver: str
    nfe: int
    images: int
    seed: int
    precision: str
    form: str
    real_images: int
    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    training: tuple[float, ...]
    floor: tuple[float, ...]
    schedules: tuple[Sampled, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """What `as_dict` gave. Raises InputError."""
        try:
            schedules = tuple(
                Sampled(**_tuples(one) | {"late": tuple(Late(**late) for late in one["late"])})
                for one in content["schedules"]
            )
            return cls(**_tuples(content) | {"schedules": schedules})
        except (KeyError, TypeError) as error:
            raise InputError(f"no diagnosis, or one of another version: {error}") from None


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """With a tuple for each list, which JSON made of it."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def read(path: Path) -> Diagnosis:
    """A diagnosis that was written as JSON. Raises InputError that names the file."""
    try:
        return Diagnosis.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # InputError is one too
        raise InputError(f"{path}: {error}") from None


def as_text(found: Diagnosis) -> str:
    """A table with a line per evaluation, the noisiest first, as sampling goes."""
    head = f"{'t':>4} {'time':>9} {'‖ε‖ train':>10}"
    for index, _ in enumerate(found.schedules):
        head += f" │ {f'‖ε‖ ({index + 1})':>9} {'ratio':>7} {'δ_t':>10}"
    lines = [
        f"{found.model} on {found.dataset}, {found.solver}, NFE {found.nfe}: "
        f"{found.images:,} images, seed {found.seed}, {found.precision}",
        "",
        f"{head} │ {'δ_t floor':>10}",
    ]
    for t in reversed(range(found.nfe)):
        line = f"{t:4} {found.times[t]:9.4g} {found.training[t]:10.4f}"
        for one in found.schedules:
            line += f" │ {one.norms[t]:9.4f} {one.ratios[t]:7.4f} {one.deltas[t]:10.4g}"
        lines.append(f"{line} │ {found.floor[t]:10.4g}")
    lines.append("")
    for index, one in enumerate(found.schedules):
        over = sum(ratio > 1 for ratio in one.ratios)
        lines.append(
            f"({index + 1}) {one.name}: distance {one.distance:.4f}; "
            f"‖ε‖ above training at {over} of {found.nfe} evaluations"
        )
        lines += [f"    from real states at t = {late.t}: distance {late.distance:.4f}" for late in one.late]
    what = "covariances" if found.form == "full" else "variances"
    lines.append(
        f"δ_t: squared Fréchet distance of means and {what} to the forward process of {found.real_images:,} real "
        f"images; floor: that of {found.images:,} of its own states"
    )
    return "\n".join(lines)


def named(schedule: Schedule) -> str:
    """A schedule in a few words."""
    if schedule.k is None:
        return "a λ per evaluation"
    if schedule.k == 0:
        return f"λ = {number(schedule.b)}"
    return f"λ_t = {number(schedule.k)}·t + {number(schedule.b)}"
