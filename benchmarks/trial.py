"""Splits the time of one trial into its parts, on this machine's GPU or processor.

    python -m benchmarks.trial [JOB.yaml] [--images N] [--repeats R] [--json]

The pure network is NFE calls at the job's micro-batch and precision, nothing else; a trial's time over it is what
lamtune adds. Parts are timed one after the other with the device waited for, and the trial as it runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from objectives.moments import Moments
from samplers import noise
from samplers.generate import Sampler
from samplers.schedule import Schedule
from search.cli import DEMO
from search.evaluator import BLOCK, Evaluator, accelerator
from search.spec import load


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a call after one that does not count."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(repeats))


def measure(job: Path, images: int, repeats: int) -> dict[str, float]:
    """Seconds of each part for `images` images of the job's first sampling."""
    spec = load(job)
    device = accelerator()
    evaluator = Evaluator.load(spec, device)
    model, sampling = evaluator.model, spec.sampling[0]
    plan = sampling.plan(model)
    sampler = Sampler(
        model, sampling, device, spec.search.seed, getattr(torch, evaluator.precision), evaluator.micro_batch
    )
    schedule = Schedule.uniform(sampling.nfe, 1.0)
    ids = torch.arange(images, device=device)
    labels = noise.labels(0, ids, model.num_classes) if model.num_classes else None
    network = sampler.network(plan.times, labels)
    x = noise.normal(0, ids, 0, model.shape, sampling.state_dtype)
    pictures = torch.randint(0, 256, (images, *model.image_shape), dtype=torch.uint8, device=device)
    features = torch.randn(images, evaluator.extractor.dim, dtype=torch.float64, device=device)
    moments = Moments.of(features)

    @torch.no_grad()
    def calls() -> None:
        for t in range(sampling.nfe):
            network(x, t)

    def draws() -> None:
        for t in range(sampling.nfe):
            noise.normal(0, ids, t, model.shape, sampling.state_dtype)

    def extract() -> None:
        for start in range(0, images, BLOCK):
            evaluator.extractor(pictures[start : start + BLOCK])

    parts: dict[str, Callable[[], object]] = {
        "trial": lambda: evaluator.merge(evaluator.sample(sampling, schedule, 0, images)[0]),
        "network": calls,
        "noise": draws,
        "features": extract,
        "moments": lambda: Moments.of(features),
        "distance": lambda: evaluator.frechet.distance(moments),
    }
    return {name: seconds(call, device, repeats) for name, call in parts.items()}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", nargs="?", type=Path, default=DEMO, help="a job file (default: the demo's)")
    parser.add_argument("--images", type=int, default=1000, help="images of the trial (default 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    taken = measure(arguments.job, arguments.images, arguments.repeats)
    if arguments.json:
        print(json.dumps(taken, indent=2))
        return
    print(f"{arguments.job.name}, {arguments.images} images on {accelerator()}")
    for name, value in taken.items():
        print(f"  {name:9} {1000 * value:10.1f} ms  {value / taken['network']:6.3f} of the network")


if __name__ == "__main__":
    main()
