"""The job file: YAML → a validated, frozen JobSpec, or an error that names the file and the key.

Checks what can be checked without opening anything else. Knows nothing of torch, Ray or the store; what a
checkpoint, an extractor or reference statistics have to say is checked by those who read them.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from samplers.errors import InputError
from samplers.sampling import SOLVERS, Analytic, Sampling

FRECHET: Literal["frechet"] = "frechet"
"""The objective that is the Fréchet distance; the others are names of `objectives.losses`."""

DEFAULT_RUNGS = (1000, 2500, 5000)
_METRIC_IMAGES = 10  # what the splits of the Inception score need


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """The network: `format` names the adapter, `path` its checkpoint (or factory), `options` its flags.

    precision: of its arithmetic, by autocast, see `evaluator.precision`; the state stays float32 or float64, and a
    decoder of latents float32, with TF32 convolutions beside half precision.
    """

    name: str = Field(min_length=1)
    format: str
    path: str | None = None
    options: dict[str, Any] = {}
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class DatasetSpec(_Section):
    """The real images: `reference` is a folder, an archive, an .npz or the bundled `digits`.

    images: a folder, an archive or an .npz of images of the training, where `reference` is statistics and a solver
    needs images (Analytic-DPM does). resize: scale and crop images to the model's size, as ADM's data loader does;
    else other sizes are refused.
    """

    name: str = Field(min_length=1)
    reference: str
    images: str | None = None
    resize: bool = False


class SearchSpec(_Section):
    """What to search and how thoroughly.

    strategy: "adaptive" (the mean λ and k with few images), "free" (one λ per evaluation) or "paper" (the paper's
    protocol). images: the most for one trial of the search. confirm: images on which λ = 1 and what was found are
    evaluated on fresh random numbers in the end, default `images`; 0 (paper only): not at all. budget: images for the
    search, without confirmation, default by the strategy. `b` and `k`: strides and ranges as the strategy names them,
    its defaults for what is left out. parameters: numbers of the solver to search beside λ (S_noise, S_churn, eta, …),
    each with its least and largest value. warm_start: begin where the store has the best schedule of a like job.
    """

    strategy: Literal["adaptive", "free", "paper"] = "adaptive"
    images: int = Field(default=10_000, ge=2)
    confirm: int | None = Field(default=None, ge=0)
    budget: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    rungs: tuple[int, ...] | None = None
    b: dict[str, float] = {}
    k: dict[str, float] = {}
    parameters: dict[str, tuple[float, float]] = {}
    warm_start: bool = True

    @model_validator(mode="after")
    def _check_rungs(self) -> "SearchSpec":
        if self.rungs is not None and (
            list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 2 or self.rungs[-1] > self.images
        ):
            raise ValueError(
                f"rungs must rise from 2 or more to at most images ({self.images}): {self.rungs}"
            )
        if self.confirm == 1:
            raise ValueError("confirm is 1: give a number of images of at least 2, or 0 for none")
        if self.strategy != "paper" and not self.confirm_images:
            raise ValueError(
                f"confirm is 0: {self.strategy} tries its answer only then; give a number of images, or strategy: paper"
            )
        if self.strategy == "paper":
            for key in ("budget", "parameters"):
                if getattr(self, key):
                    raise ValueError(f"{key} belongs to the strategies adaptive and free, not to paper")
        return self

    @property
    def confirm_images(self) -> int:
        """See `confirm`."""
        return self.images if self.confirm is None else self.confirm

    @property
    def all_rungs(self) -> tuple[int, ...]:
        """Numbers of images after which a trial reports a distance; the last one is `images`."""
        rungs = DEFAULT_RUNGS if self.rungs is None else self.rungs
        return (*(r for r in rungs if r < self.images), self.images)


class ResourcesSpec(_Section):
    """Who does the work. `workers`: how many; auto: as many as there is room for.

    What each of them gets: `gpus`, 0 to 1, auto: a whole one where there are GPUs (0.5: two workers share one);
    `cpus`, processor cores, auto: one where there is no GPU. Which nodes of a cluster will do: `custom`, amounts of
    Ray's own resources that a worker takes there; `labels`, labels that the node must have. `micro_batch`: images of a
    network call, auto: by their size (1,250 of 32×32), and as many as fit into the GPU. A GPU's calls are filled up to
    it: where more than eight share a trial of 10,000 small images, a number that leaves a call for each is better.
    """

    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpus: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    cpus: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}
    labels: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]] = {}
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"

    @field_validator("custom")
    @classmethod
    def _no_other_key_says_it(cls, value: dict[str, float]) -> dict[str, float]:
        if taken := {"CPU", "GPU"} & set(value):
            raise ValueError(f"{' and '.join(sorted(taken))}: write cpus and gpus instead")
        return value


class JobSpec(_Section):
    """A whole job: one search per entry of `sampling` (a list of NFE in the file makes several).

    objective: what the search minimises, `frechet` or one of `objectives.losses`. metrics: what is measured of λ = 1
    and of what was found besides; see `objectives.metrics`.
    """

    model: ModelSpec
    dataset: DatasetSpec
    features: str | dict[str, Any] = "inception-v3-compat"
    sampling: tuple[Sampling, ...]
    search: SearchSpec = SearchSpec()
    objective: Literal["frechet", "kid", "precision", "recall", "inception_score"] = FRECHET
    metrics: tuple[str, ...] = ()
    resources: ResourcesSpec = ResourcesSpec()
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _check_metrics(self) -> "JobSpec":
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: each once: {', '.join(self.metrics)}")
        if self.metrics and self.search.confirm_images < _METRIC_IMAGES:
            raise ValueError(
                f"metrics: they are measured on search.confirm images, {self.search.confirm_images} here: "
                f"give at least {_METRIC_IMAGES}"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the paths of the model and its options start: the job file's folder."""
        return self._folder

    @property
    def losses(self) -> tuple[str, ...]:
        """The objective where it is one of `objectives.losses`, else nothing."""
        return () if self.objective == FRECHET else (self.objective,)

    @property
    def files(self) -> dict[str, Path]:
        """The key of every text that names a file or folder which exists here, and where that is.

        Every process that works on the job must find the same there.
        """
        found: dict[str, Path] = {}

        def walk(key: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for name, part in value.items():
                    walk(f"{key}.{name}", part)
            elif isinstance(value, list):
                for part in value:
                    walk(key, part)
            elif isinstance(value, str):
                for text in (value, value.rpartition(":")[0]):  # net.py:make
                    path = self.folder / Path(text).expanduser()
                    if text and path.exists():
                        found[key] = path
                        break

        data = self.as_dict()
        for key in ("path", "options"):
            walk(f"model.{key}", data["model"][key])
        for key in ("reference", "images"):
            walk(f"dataset.{key}", data["dataset"][key])
        walk("features", data["features"])
        for sampling in data["sampling"]:
            walk("sampling.ms_eps", sampling.get("ms_eps"))
        return found

    @field_validator("sampling", mode="before")
    @classmethod
    def _one_per_nfe(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            nfe = value.get("nfe")
            if nfe == []:
                raise ValueError("nfe is empty: name at least one number of network evaluations")
            return [{**value, "nfe": n} for n in nfe] if isinstance(nfe, list) else [dict(value)]
        return value

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the store: what `parse` took, with defaults filled in, and the folder."""
        sampling = [asdict(s) for s in self.sampling]
        return {**self.model_dump(mode="json"), "sampling": sampling, "folder": str(self.folder)}


def from_dict(data: Mapping[str, Any], source: str) -> JobSpec:
    """What `as_dict` gave, perhaps in an older lamtune. Raises InputError."""
    if "folder" not in data:
        raise InputError(f"{source} was made by a lamtune that did not keep its folder: submit its job file")
    return parse({key: value for key, value in data.items() if key != "folder"}, source, Path(data["folder"]))


def load(path: str | Path) -> JobSpec:
    """Read a job file. Relative paths in it are relative to its folder. Raises InputError."""
    return loads(read(path), str(path), Path(path).parent)


def read(path: str | Path) -> str:
    """The text of a job file, or of the standard input as `-`. Raises InputError."""
    try:
        return sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: the job file cannot be read: {reason}") from None


def loads(text: str, source: str, folder: Path) -> JobSpec:
    """A job from the text of its file; see `parse`. Raises InputError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not a YAML file: {error}") from None
    return parse(data, source, folder)


def parse(data: Any, source: str, folder: Path) -> JobSpec:
    """Validate the content of a job file; `source` names it in errors, `folder` is where its paths start."""
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: a job is a mapping with the keys model, dataset, sampling, …")
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {line}" for line in _lines(error))) from None
    return _resolve(spec, folder)


def _lines(error: ValidationError) -> list[str]:
    """One line per mistake, beginning with its key as written in the file."""
    lines = []
    for mistake in error.errors(include_url=False):
        tags = {*SOLVERS, "int", "float", "str"}  # union branches, which the file does not have
        key = ".".join(
            str(p) for p in mistake["loc"] if isinstance(p, str) and p not in tags and "[" not in p
        )
        reason = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            reason = "unknown key"
        elif mistake["type"] in ("missing", "missing_argument"):
            reason = "this key is missing"
        elif "input" in mistake and not isinstance(mistake["input"], Mapping | list):
            reason += f" (got {mistake['input']!r})"
        lines.append(f"{key}: {reason}" if key else reason)
    return list(dict.fromkeys(lines))


def _resolve(spec: JobSpec, folder: Path) -> JobSpec:
    """The same job with its paths made absolute, so that any process can open them."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    data: dict[str, Any] = {}
    if spec.dataset.reference != "digits" or Path(absolute("digits")).exists():
        data["reference"] = absolute(spec.dataset.reference)
    if spec.dataset.images is not None:
        data["images"] = absolute(spec.dataset.images)
    update: dict[str, Any] = {"dataset": spec.dataset.model_copy(update=data)}
    update["sampling"] = tuple(
        s.with_ms_eps(Path(absolute(s.ms_eps))) if isinstance(s, Analytic) and s.ms_eps is not None else s
        for s in spec.sampling
    )
    if isinstance(spec.features, dict):
        if isinstance(path := spec.features.get("path"), str):
            update["features"] = {**spec.features, "path": absolute(path)}
    elif Path(absolute(spec.features)).is_file():
        update["features"] = absolute(spec.features)
    resolved = spec.model_copy(update=update)
    resolved._folder = folder.resolve()
    return resolved
