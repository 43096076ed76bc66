"""Whether the memory of a search grows with its trials: the driver's and the workers', over some 200 of them.

    python -m benchmarks.memory [JOB.yaml] [--images N] [--json]

One submission of the job at NFE 2, 3, 4, …: search after search with the same driver and workers. Images: of a full
trial. Not part of `make bench`: it takes minutes.
"""

import statistics
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.common import Found, Part, grid, main, megabytes, scratch
from benchmarks.job import plain
from benchmarks.servers import sampler_workers
from search.runner import submit
from search.spec import load
from storage import Store, open_store

_NFES = range(2, 20)
_PERIOD_S = 2.0
_FIRST = 30  # trials after which everything has been loaded


def measure(job: Path, images: int) -> Found:
    """(trials, bytes of the driver, bytes of the largest worker) over time; the unique ones, without shared pages."""
    spec = load(job)
    first = spec.sampling[0]
    samplings = tuple(replace(first, nfe=nfe) for nfe in _NFES)
    many = plain(spec, "adaptive", images).model_copy(update={"sampling": samplings})
    rows: list[tuple[int, int, int]] = []
    ended = threading.Event()
    with scratch() as folder:
        url = f"sqlite:///{folder}/store.db"

        def watch() -> None:
            with open_store(url) as store:
                while not ended.wait(_PERIOD_S):
                    rows.append((_trials(store), *_bytes()))

        open_store(url).close()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        submit(many, url, Console(quiet=True))
        ended.set()
        watcher.join()
    return {"rows": rows}


def _trials(store: Store) -> int:
    return sum(len(store.evaluations(job.id)) for job in store.jobs(limit=len(_NFES)))


def _bytes() -> tuple[int, int]:
    me = psutil.Process()
    workers = [0]
    for worker in sampler_workers(me):
        with suppress(psutil.Error):  # it has ended
            workers.append(worker.memory_full_info().uss)
    return me.memory_full_info().uss, max(workers)


def table(found: Found) -> list[str]:
    """Early, in the middle and late."""
    rows = [row for row in found["rows"] if row[0] >= _FIRST]
    if not rows:
        return [f"  fewer than {_FIRST} trials"]
    third = max(len(rows) // 3, 1)
    parts = {"first third": rows[:third], "second": rows[third : 2 * third], "last": rows[2 * third :]}
    lines: list[list[object]] = [["", "trials", "driver", "largest worker"]]
    for name, part in parts.items():
        if part:
            driver, worker = (statistics.median(row[i] for row in part) for i in (1, 2))
            lines.append([name, f"{part[0][0]} to {part[-1][0]}", megabytes(driver), megabytes(worker)])
    return grid(lines)


PART = Part("memory over many trials", measure, table)

if __name__ == "__main__":
    main({"memory": PART}, __doc__)
