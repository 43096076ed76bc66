"""Runs whole searches of a job, adaptive and the paper's, as `lamtune submit` does: with workers and a store.

    python -m benchmarks.job [JOB.yaml] [--images N] [--json]

Each has a store and a cache of its own. Images: of a full trial.
"""

import time
from pathlib import Path

from rich.console import Console

from benchmarks.common import Found, Part, grid, main, megabytes, peaks, scratch
from search.runner import submit
from search.spec import JobSpec, load
from storage import open_store

_STRATEGIES = ("adaptive", "paper")


def measure(job: Path, images: int) -> Found:
    """Wall time, time of the workers, trials and images of each search, and what it found."""
    return {name: _search(load(job), name, images) for name in _STRATEGIES}


def plain(spec: JobSpec, strategy: str, images: int) -> JobSpec:
    """The job with a search of this strategy from λ = 1; the budget and ranges of another strategy are left out."""
    asked = {"strategy": strategy, "images": images, "rungs": None, "confirm": None, "warm_start": False}
    if strategy != spec.search.strategy:
        asked |= {"budget": None, "parameters": {}, "b": {}, "k": {}}
    return spec.model_copy(update={"search": spec.search.model_copy(update=asked)})


def _search(spec: JobSpec, strategy: str, images: int) -> Found:
    whole = plain(spec, strategy, images).model_copy(update={"sampling": spec.sampling[:1]})
    with scratch() as folder:
        url = f"sqlite:///{folder}/store.db"
        began = time.perf_counter()
        (job,) = submit(whole, url, Console(quiet=True))
        wall = time.perf_counter() - began
        with open_store(url) as store:
            trials = store.evaluations(job.id)
            best = store.best(job.model, job.dataset, job.nfe, job.solver)
    return {
        "seconds": wall,
        "worker_seconds": sum(t.seconds for t in trials),
        "trials": len(trials),
        "network_evaluations": sum(t.network_evaluations for t in trials),
        "full_trials": sum(t.network_evaluations for t in trials) / (images * job.nfe),
        "distance": best.distance,
        "gain": best.gain,
        **peaks(),
    }


def table(found: Found) -> list[str]:
    """A column per strategy."""
    rows: list[list[object]] = [["", *found]]
    for name, text in (
        ("wall time", lambda f: f"{f['seconds']:.1f} s"),
        ("time of workers", lambda f: f"{f['worker_seconds']:.1f} s"),
        ("trials", lambda f: str(f["trials"])),
        ("images, in full trials", lambda f: f"{f['full_trials']:.2f}"),
        ("distance", lambda f: f"{f['distance']:.4f}"),
        ("gain over λ = 1", lambda f: "unknown" if f["gain"] is None else f"{f['gain']:.4f}"),
        ("host memory, this process", lambda f: megabytes(f["host_peak"])),
    ):
        rows.append([name, *(text(one) for one in found.values())])
    return grid(rows)


PART = Part("whole searches", measure, table)

if __name__ == "__main__":
    main({"job": PART}, __doc__)
