"""What a job pays before its first trial: imports, loading, compilation, Ray and the workers.

    python -m benchmarks.startup [JOB.yaml] [--json]

Imports and loading are timed in processes of their own: the first with an empty cache (statistics of the real images,
and compilation on a GPU), the second with what the first one left. Workers start twice, as two jobs have them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import Found, Part, grid, main, scratch
from search import pool
from search.evaluator import Evaluator
from search.spec import load

_IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
_LOAD = (
    "import sys, time; from search.spec import load; from search.evaluator import Evaluator, accelerator; "
    "spec = load(sys.argv[1]); t = time.perf_counter(); Evaluator.load(spec, accelerator()); "
    "print(time.perf_counter() - t)"
)


def measure(job: Path, images: int) -> Found:
    """Seconds of each step."""
    found: Found = {
        f"import {name}": _child(_IMPORT.format(name)) for name in ("torch", "ray.tune", "search.runner")
    }
    with scratch(compiled=False):
        found["load, nothing cached"] = _child(_LOAD, str(job))
        found["load, cached"] = _child(_LOAD, str(job))
        spec = load(job)
        evaluator = Evaluator.load(spec, torch.device("cpu"))
        asked = evaluator.reference, evaluator.model.fingerprint, pool.available(spec, [pool.this_machine()])
        began = time.perf_counter()
        with pool.connected("local"):
            found["start Ray"] = time.perf_counter() - began
            for which in ("the first worker", "the first worker of the next job"):
                began = time.perf_counter()
                workers = pool.start_workers(spec, *asked)
                found[f"start {which}"] = time.perf_counter() - began
                pool.stop_workers(workers)
    return found


def _child(code: str, *words: str) -> float:
    """What a process of its own prints: seconds."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], check=True, capture_output=True, text=True, env=os.environ
    )
    return float(done.stdout.split()[-1])


def table(found: Found) -> list[str]:
    """A line per step."""
    return grid([[name, f"{taken:,.2f} s"] for name, taken in found.items()])


PART = Part("start-up of a job", measure, table)

if __name__ == "__main__":
    main({"startup": PART}, __doc__)
