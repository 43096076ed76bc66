"""Times `lamtune serve` on a store of many finished trials: /api/best and /api/jobs over HTTP.

    python -m benchmarks.service [--store URL] [--trials N] [--per-job N] [--requests R] [--json]

The store must be empty, and stays filled; without --store it is a SQLite file that goes again. What answers is the
command itself in a process of its own, through one connection that is kept (and then eight at a time); with the time
comes the plan of the queries behind `best`, and the indexes in it.
"""

import argparse
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Any
from urllib.parse import urlencode

from sqlalchemy import Engine, MetaData, event

from samplers.errors import InputError
from samplers.schedule import Schedule
from storage import Evaluator, NewJob, open_store
from storage.connection import make_engine, parse

NFES = (10, 20, 50, 100)
SEEDS = 5
AT_ONCE = 8


def fill(url: str, trials: int, per_job: int) -> list[dict[str, Any]]:
    """Fill an empty store; return the questions that it can answer.

    One job is made as a search makes it; the others are copies of its rows under other names, so that the benchmark
    need not know the tables' columns.
    """
    with open_store(url) as store:
        if store.jobs(limit=1):
            raise InputError(f"--store {store.safe_url} has jobs: name an empty database")
        job = store.create_job(
            NewJob(
                study_name="s",
                model="model-0",
                model_fingerprint="w",
                dataset="cifar10",
                solver="ddpm",
                sampling={"variance": "learned_range"},
                nfe=NFES[0],
                strategy="paper",
                images=10_000,
                seed=0,
                spec={"model": {"name": "model-0"}},
                evaluator=Evaluator(
                    fingerprint="e", features="inception", dimension=2048, reference="r", details={}
                ),
            )
        )
        started = store.start_evaluation(job.id, 0, "baseline", Schedule.uniform(job.nfe, 1.0))
        for images, distance in ((1000, 5.0), (2500, 4.0), (5000, 3.5), (10_000, 3.2)):
            store.report_rung(
                started.id, images=images, distance=distance, network_evaluations=images, seconds=images / 100
            )
        store.finish_evaluation(started.id)
        store.set_status(job.id, "finished")
    jobs = -(-trials // per_job)
    models = -(-jobs // (len(NFES) * SEEDS))
    kinds = list(product(range(models), NFES, range(SEEDS)))[:jobs]
    engine = make_engine(parse(url))
    tables = MetaData()
    with engine.begin() as connection:
        tables.reflect(connection, only=["lamtune_jobs", "lamtune_evaluations"])
        job_table, evaluation_table = tables.tables["lamtune_jobs"], tables.tables["lamtune_evaluations"]
        job_row = dict(connection.execute(job_table.select()).mappings().one())
        row = dict(connection.execute(evaluation_table.select()).mappings().one())
        connection.execute(evaluation_table.delete())
        connection.execute(job_table.delete())
        job_rows, rows = [], []
        for number, (model, nfe, seed) in enumerate(kinds, start=1):
            names = {"study_name": f"s{number}", "model": f"model-{model}", "nfe": nfe, "seed": seed}
            job_rows.append(job_row | names | {"id": number})
            for trial in range(min(per_job, trials - len(rows))):
                distance = 3.0 + (trial * 7 % per_job) / per_job
                own = {"id": len(rows) + 1, "job_id": number, "number": trial, "distance": distance}
                b = 1.0 + trial / 1000
                rows.append(row | own | {"b": b, "mean": b, "lambdas": [b] * nfe})
        connection.execute(job_table.insert(), job_rows)
        connection.execute(evaluation_table.insert(), rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")  # PostgreSQL does so by itself, some time later
    engine.dispose()
    return [
        {"model": f"model-{m}", "dataset": "cifar10", "nfe": n}
        for m, n in dict.fromkeys(k[:2] for k in kinds)
    ]


def plan(url: str, question: dict[str, Any]) -> list[str]:
    """How the database answers every query behind `best`."""
    asked: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "lamtune_jobs" in statement + "lamtune_evaluations":
            asked.append((statement, parameters))

    with open_store(url) as store:
        event.listen(Engine, "before_cursor_execute", listen)
        store.best(**question)
        event.remove(Engine, "before_cursor_execute", listen)
    engine = make_engine(parse(url))
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN ANALYZE"
    with engine.connect() as connection:
        lines = [
            str(line[-1])
            for statement, parameters in asked
            for line in (*connection.exec_driver_sql(f"{explain} {statement}", parameters), ("",))
        ]
    engine.dispose()
    return lines


@contextmanager
def served(url: str) -> Iterator[int]:
    """`lamtune serve` of a store; gives its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    words = ["serve", "--port", str(port), "--store", url]
    process = subprocess.Popen(
        [sys.executable, "-c", "from search.cli import main; main()", *words], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                ask(http.client.HTTPConnection("127.0.0.1", port), "/api/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def ask(connection: http.client.HTTPConnection, path: str) -> float:
    """The seconds that a GET takes; its answer must be a good one."""
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    return time.perf_counter() - began


def times(port: int, paths: Sequence[str], at_once: int) -> list[float]:
    """The seconds of every request, `at_once` of them in flight, each on a connection that is kept."""

    def one_after_the_other(mine: Sequence[str]) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        ask(connection, mine[0])
        return [ask(connection, path) for path in mine]

    with ThreadPoolExecutor(at_once) as threads:
        parts = threads.map(one_after_the_other, [paths[i::at_once] for i in range(at_once)])
        return [taken for part in parts for taken in part]


def measure(url: str, trials: int, per_job: int, requests: int) -> dict[str, Any]:
    """Milliseconds per request, and the plan of the queries."""
    questions = fill(url, trials, per_job)
    jobs = -(-trials // per_job)
    best = [f"/api/best?{urlencode(questions[i % len(questions)])}" for i in range(requests)]
    cases = {
        "health": (["/api/health"] * requests, 1),
        "best": (best, 1),
        f"best, {AT_ONCE} at once": (best, AT_ONCE),
        "jobs, first page": (["/api/jobs"] * requests, 1),
        "jobs, last page": ([f"/api/jobs?before_id={min(jobs, 50) + 1}"] * requests, 1),
        "a job's history": ([f"/api/jobs/{1 + i % jobs}" for i in range(requests)], 1),
    }
    result: dict[str, Any] = {}
    with served(url) as port:
        for name, (paths, at_once) in cases.items():
            taken = sorted(1000 * t for t in times(port, paths, at_once))
            result[name] = {"median_ms": statistics.median(taken), "p95_ms": taken[int(0.95 * len(taken))]}
    lines = plan(url, questions[len(questions) // 2])
    used = sorted(set(re.findall(r"\b(?:ix|uq|pk|sqlite_autoindex)_[a-z_0-9]+", "\n".join(lines))))
    return {
        "trials": trials,
        "jobs": jobs,
        "requests": requests,
        "times": result,
        "indexes": used,
        "plan": lines,
    }


def main() -> None:
    """Print the table and the plan, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--store", metavar="URL", help="an empty database (default: a SQLite file for this run)"
    )
    parser.add_argument("--trials", type=int, default=10_000, help="finished trials (default 10000)")
    parser.add_argument("--per-job", type=int, default=25, help="trials of each job (default 25)")
    parser.add_argument("--requests", type=int, default=300, help="requests of each kind (default 300)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.store or f"sqlite:///{folder}/store.db"
        found = measure(url, arguments.trials, arguments.per_job, arguments.requests)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['trials']:,} trials in {found['jobs']:,} jobs, {found['requests']} requests of each kind")
    print(f"  {'':18} {'median':>8}   {'p95':>8}")
    for name, taken in found["times"].items():
        print(f"  {name:18} {taken['median_ms']:8.1f}   {taken['p95_ms']:8.1f} ms")
    print(f"indexes behind best: {', '.join(found['indexes']) or 'none'}\n")
    print("\n".join(found["plan"]))


if __name__ == "__main__":
    main()
