"""What a diagnosis of a network's exposure bias has found, as a value: for the store, for files and for people.

Needs no torch. How it is measured is `search.diagnose`'s matter, how it is drawn that of `plots`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from samplers.errors import InputError
from samplers.schedule import Schedule
from search.report import line_in_words


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """Sampling that started at evaluation t from a real image's state: the distance of its images."""

    t: int
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Sampling with one schedule. Lists are indexed by evaluation t, 0 the last and cleanest.

    norms: mean ‖ε‖₂ of the network's answers, before λ divides them. deltas: δ_t, see `objectives.states`. distance: of
    the images, as in a search.
    """

    name: str
    k: float | None
    b: float | None
    lambdas: tuple[float, ...]
    norms: tuple[float, ...]
    deltas: tuple[float, ...]
    distance: float
    late: tuple[Late, ...] = ()

    @property
    def scaled(self) -> tuple[float, ...]:
        """Mean ‖ε/λ‖₂, of the noise that the solver removes: what the paper's figures show after epsilon scaling."""
        return tuple(norm / lam for norm, lam in zip(self.norms, self.lambdas, strict=True))

    @property
    def is_baseline(self) -> bool:
        """Whether λ = 1 throughout."""
        return all(lam == 1 for lam in self.lambdas)


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

    def ratios(self, one: Sampled) -> tuple[float, ...]:
        """‖ε/λ‖₂ in sampling to ‖ε‖₂ in training: above 1 where exposure bias shows."""
        return tuple(scaled / norm for scaled, norm in zip(one.scaled, self.training, strict=True))

    def summary(self, one: Sampled) -> str:
        """At how many evaluations a schedule leaves the noise too large, and at how many it lessens that."""
        over = sum(ratio > 1 for ratio in self.ratios(one))
        if one.is_baseline:
            return f"‖ε‖ above training at {over} of {self.nfe} evaluations"
        said = f"‖ε/λ‖ above training at {over} of {self.nfe} evaluations"
        plain = next((other for other in self.schedules if other.is_baseline), None)
        if plain is None:
            return said
        below = sum(mine < theirs for mine, theirs in zip(one.scaled, plain.scaled, strict=True))
        return f"{said}, below λ = 1 at {below}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from the rest."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for one, row in zip(self.schedules, plain["schedules"], strict=True):
            row |= {"scaled": list(one.scaled), "ratios": list(self.ratios(one))}
        return plain

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """What `as_dict` gave. Raises InputError."""
        try:
            schedules = tuple(
                Sampled(**_fields(Sampled, one) | {"late": tuple(Late(**late) for late in one["late"])})
                for one in content["schedules"]
            )
            return cls(**_fields(cls, content) | {"schedules": schedules})
        except (KeyError, TypeError) as error:
            raise InputError(f"no diagnosis, or one of another version: {error}") from None


def _fields(kind: type[Sampled | Diagnosis], content: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass takes of JSON, with a tuple for each list."""
    found = {field.name: content[field.name] for field in fields(kind) if field.name in content}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


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
        head += f" │ {f'‖ε/λ‖ ({index + 1})':>9} {'ratio':>7} {'δ_t':>10}"
    lines = [
        f"{found.model} on {found.dataset}, {found.solver}, NFE {found.nfe}: "
        f"{found.images:,} images, seed {found.seed}, {found.precision}",
        "",
        f"{head} │ {'δ_t floor':>10}",
    ]
    for t in reversed(range(found.nfe)):
        line = f"{t:4} {found.times[t]:9.4g} {found.training[t]:10.4f}"
        for one in found.schedules:
            line += f" │ {one.scaled[t]:9.4f} {found.ratios(one)[t]:7.4f} {one.deltas[t]:10.4g}"
        lines.append(f"{line} │ {found.floor[t]:10.4g}")
    lines.append("")
    for index, one in enumerate(found.schedules):
        lines.append(f"({index + 1}) {one.name}: distance {one.distance:.4f}; {found.summary(one)}")
        lines += [f"    from real states at t = {late.t}: distance {late.distance:.4f}" for late in one.late]
    what = "covariances" if found.form == "full" else "variances"
    lines.append(
        f"δ_t: squared Fréchet distance of means and {what} to the forward process of {found.real_images:,} real "
        f"images; floor: that of {found.images:,} of its own states"
    )
    return "\n".join(lines)


def named(schedule: Schedule) -> str:
    """A schedule in a few words."""
    return "a λ per evaluation" if schedule.k is None else line_in_words(schedule.k, schedule.b)
