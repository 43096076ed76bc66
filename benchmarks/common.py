"""What the benchmarks share: the clock, the machine, the prepared job, tables, and the words on the command line."""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from samplers import noise
from samplers.cache import cache_root
from samplers.generate import Sampler
from samplers.prediction import Predict
from samplers.sampling import Solver
from samplers.schedule import Schedule
from search.evaluator import Evaluator, accelerator
from search.spec import FRECHET, JobSpec, load

DEMO = Path(__file__).parents[1] / "search" / "demo.yaml"
Found = dict[str, Any]
"""What a benchmark measured: plain data for JSON."""


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark: `measure` times a job with a number of images, `table` says it in lines that a person reads."""

    title: str
    measure: Callable[[Path, int], Found]
    table: Callable[[Found], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Case:
    """A job that is loaded on this machine's GPU or processor, and one of its samplings."""

    spec: JobSpec
    evaluator: Evaluator
    sampling: Solver

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.evaluator.device

    @property
    def sampler(self) -> Sampler:
        """As the evaluator samples."""
        one = self.evaluator
        precision = getattr(torch, one.precision)
        return Sampler(one.model, self.sampling, one.device, one.seed, precision, one.micro_batch)

    def at(self, nfe: int) -> "Case":
        """The same with another number of evaluations."""
        return replace(self, sampling=replace(self.sampling, nfe=nfe))

    def trial(self, images: int) -> float:
        """The distance of λ = 1, as one worker samples and measures it; nothing comes from a cache."""
        one = self.evaluator
        found = one.sample(self.sampling, Schedule.uniform(self.sampling.nfe, 1.0), 0, images)
        return one.score(FRECHET, None, [found.features])[0]

    def batch(self, count: int) -> Tensor:
        """Start states of the images 0 … count − 1."""
        ids = torch.arange(count, device=self.device)
        return noise.normal(0, ids, 0, self.evaluator.model.shape, self.sampling.state_dtype)

    def network(self, count: int) -> Predict:
        """The network in one call for `count` images."""
        model = self.evaluator.model
        ids = torch.arange(count, device=self.device)
        labels = noise.labels(0, ids, model.num_classes) if model.num_classes else None
        sampler = replace(self.sampler, micro_batch=count)
        return sampler.network(self.sampling.plan(model).times, labels)


def load_case(job: Path) -> Case:
    """Read everything that a job names, for one worker: on a processor that is one thread."""
    spec = load(job)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return Case(spec, Evaluator.load(spec, accelerator()), spec.sampling[0])


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median time of a call after one that does not count, with the device waited for."""
    once(call)
    return statistics.median(once(call) for _ in range(repeats))


def once(call: Callable[[], object]) -> float:
    """The time of one call, with the device waited for."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peaks() -> Found:
    """Bytes: the most that this process and its children had on the host, and that torch took of the device since it
    was reset, with the memory of CUDA graphs."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return {"host_peak": host, "largest_child_peak": children, "device_peak": device}


def machine() -> str:
    """The hardware and torch, in words: a time means nothing without them."""
    cores = f"{len(os.sched_getaffinity(0))} cores of {platform.processor() or platform.machine()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*gpus, cores, f"torch {torch.__version__}"])


@contextmanager
def scratch(*, compiled: bool = True) -> Iterator[Path]:
    """An empty folder which is also lamtune's cache meanwhile, so that no feature of an earlier run is found.

    compiled: code that was compiled is still found, as in all searches but the first one on a host.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = cache_root() if compiled else Path(folder)
        places = {"LAMTUNE_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": str(code / "compiled")}
        with patch.dict(os.environ, places):
            # torch has set it beside its own, where something was compiled before.
            os.environ.pop("TRITON_CACHE_DIR", None)
            yield Path(folder)


def grid(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of columns, the first one flush left and the others right."""
    texts = [[f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return [
        "  "
        + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    ]


def milliseconds(value: float) -> str:
    """A time in seconds, as text."""
    return f"{1000 * value:,.1f} ms"


def megabytes(value: float) -> str:
    """Bytes, as text."""
    return f"{value / 2**20:,.0f} MiB"


def main(parts: Mapping[str, Part], description: str | None) -> None:
    """The command of one benchmark or several: measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", nargs="?", type=Path, default=DEMO, help="a job file (default: the demo's)")
    parser.add_argument("--images", type=int, default=500, help="images of a trial (default 500)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result: Found = {"machine": machine(), "job": arguments.job.name, "images": arguments.images}
    if not arguments.json:
        print(f"{result['job']}, {arguments.images:,} images a trial, on {result['machine']}")
    for name, part in parts.items():
        began = time.perf_counter()
        result[name] = part.measure(arguments.job, arguments.images)
        taken = time.perf_counter() - began
        if not arguments.json:
            title = f"{part.title} (measured in {taken:.0f} s)"
            print("\n".join(["", title, *part.table(result[name])]), flush=True)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
