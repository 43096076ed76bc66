"""Times `lamtune serve` on a store of many finished trials, alone and while searches write to it.

    python -m benchmarks.service [--store URL] [--trials N] [--per-job N] [--jobs N] [--requests R] [--json]

A PostgreSQL that goes again, or the empty database at URL, is filled with finished trials. `lamtune serve`, in a
process of its own, is asked through one connection that is kept, and then through eight; with the times come the plans
of the queries, and the indexes in them. Then so many jobs of four NFE each (an exact denoiser of 8×8 pixels) start on
a Ray cluster of this machine, each in its own `lamtune submit`, and it is asked again while all of them search; the
command fails where a job or a result of one is missing in the end. `--jobs 0`, which SQLite needs: none of that.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import yaml
from sqlalchemy import Engine, MetaData, event

from benchmarks.jobs import GAUSS, new_job
from benchmarks.servers import RayCluster, new_database, postgresql, until
from samplers.errors import InputError
from samplers.schedule import Schedule
from storage import Evaluator, Store, open_store
from storage.connection import make_engine, parse

NFES = (10, 20, 50, 100)
SEEDS = 5
AT_ONCE = 8
BUSY_NFES = (4, 5, 6, 8)


def busy_job(number: int) -> dict[str, Any]:
    """A job file: four searches of trials that take about a second."""
    return {
        **GAUSS,
        "model": {**GAUSS["model"], "name": f"busy-{number}"},
        "sampling": {"solver": "ddpm", "nfe": list(BUSY_NFES)},
        "search": {
            "strategy": "paper",
            "images": 4000,
            "confirm": 0,
            "rungs": [1000],
            "seed": number,  # features that one has sampled are of no use to another
            "b": {"coarse": 0.05, "fine": 0.01},
            "k": {"start": 0, "stop": 0},
        },
        "resources": {"workers": 1},
    }


def fill(url: str, trials: int, per_job: int) -> list[dict[str, Any]]:
    """Fill an empty store; return the questions that it can answer.

    One job is made as a search makes it; the others are copies of its rows under other names, so that the benchmark
    need not know the tables' columns.
    """
    with open_store(url) as store:
        if store.jobs(limit=1):
            raise InputError(f"--store {store.safe_url} has jobs: name an empty database")
        job = store.create_job(
            new_job(
                model="model-0",
                dataset="cifar10",
                sampling={"variance": "learned_range"},
                nfe=NFES[0],
                images=10_000,
                spec={"model": {"name": "model-0"}},
                evaluator=Evaluator(
                    fingerprint="e", features="inception", dimension=2048, reference="r", details={}
                ),
            )
        )
        started = store.start_evaluation(job.id, 0, "baseline", Schedule.uniform(job.nfe, 1.0))
        for images, distance in ((1000, 5.0), (2500, 4.0), (5000, 3.5), (10_000, 3.2)):
            store.report_rung(
                started.id,
                images=images,
                distance=distance,
                network_evaluations=images,
                seconds=images / 100,
                influence=np.random.default_rng(0).bytes(4 * images // 5),
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
        if engine.dialect.name == "postgresql":
            for table in ("lamtune_jobs", "lamtune_evaluations"):  # the next ids are behind ours
                connection.exec_driver_sql(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) FROM {table}))"
                )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")  # PostgreSQL does so by itself, some time later
    engine.dispose()
    return [
        {"model": f"model-{m}", "dataset": "cifar10", "nfe": n}
        for m, n in dict.fromkeys(k[:2] for k in kinds)
    ]


def plan(url: str, call: Callable[[Store], object]) -> list[str]:
    """How the database answers every query behind a call."""
    asked: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and re.search("lamtune_(jobs|evaluations)", statement):
            asked.append((statement, parameters))

    with open_store(url) as store:
        event.listen(Engine, "before_cursor_execute", listen)
        call(store)
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


def indexes(lines: Sequence[str]) -> list[str]:
    """The indexes in a plan."""
    return sorted(set(re.findall(r"\b(?:ix|uq|pk|sqlite_autoindex)_[a-z_0-9]+", "\n".join(lines))))


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


def ask_all(port: int, questions: Sequence[dict[str, Any]], jobs: int, requests: int) -> dict[str, Any]:
    """Milliseconds per request of each kind. jobs: the first ones of the store, all with evaluations."""
    best = [f"/api/best?{urlencode(questions[i % len(questions)])}" for i in range(requests)]
    cases = {
        "health": (["/api/health"] * requests, 1),
        "best": (best, 1),
        f"best, {AT_ONCE} at once": (best, AT_ONCE),
        "jobs, first page": (["/api/jobs"] * requests, 1),
        "jobs, last page": ([f"/api/jobs?before_id={min(jobs, 50) + 1}"] * requests, 1),
        "a job's first page": ([f"/api/jobs/{1 + i % jobs}" for i in range(requests)], 1),
    }
    result = {}
    for name, (paths, at_once) in cases.items():
        taken = sorted(1000 * t for t in times(port, paths, at_once))
        result[name] = {"median_ms": statistics.median(taken), "p95_ms": taken[int(0.95 * len(taken))]}
    return result


def ask_while_busy(url: str, jobs: int, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run so many jobs, ask while all of them search, and wait for their end.

    Raises AssertionError where one ended before everything was asked, failed, or has not left all its results.
    """
    models = [f"busy-{number}" for number in range(jobs)]
    with ExitStack() as stack, open_store(url) as store:

        def trials() -> int:
            return sum(len(store.evaluations(job.id)) for m in models for job in store.jobs(model=m))

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = RayCluster({"LAMTUNE_CACHE": str(folder)})
        stack.callback(cluster.stop)
        until(lambda: cluster.living() == 1)
        cluster.add(cpus=jobs)
        until(lambda: cluster.living() == 2)
        drivers = []
        for number in range(jobs):
            file = folder / f"{number}.yaml"
            file.write_text(yaml.safe_dump(busy_job(number)))
            log = folder / f"{number}.log"
            drivers.append(cluster.drive("submit", str(file), log=log, LAMTUNE_STORE=url))
            stack.callback(drivers[-1].kill)

        def ended() -> int:
            for number, one in enumerate(drivers):
                assert not one.poll(), (folder / f"{number}.log").read_text()
            return sum(one.poll() is not None for one in drivers)

        until(lambda: ended() or all(store.jobs(model=m, status="running") for m in models), 300)
        before, began = trials(), time.monotonic()
        found = ask()
        after, asked_s = trials(), time.monotonic() - began
        assert not ended(), "a job ended before everything was asked"
        until(lambda: ended() == jobs, 900)
        for model, nfe in product(models, BUSY_NFES):
            assert store.best(model=model, dataset="digits", nfe=nfe).status == "finished"
        return {"trials": trials(), "trials_meanwhile": after - before, "asked_s": asked_s, "times": found}


def measure(url: str, trials: int, per_job: int, jobs: int, requests: int) -> dict[str, Any]:
    """The times, and the plans of the queries."""
    questions = fill(url, trials, per_job)
    filled = -(-trials // per_job)
    result: dict[str, Any] = {"trials": trials, "filled_jobs": filled, "jobs": jobs, "requests": requests}
    with served(url) as port:

        def ask() -> dict[str, Any]:
            return ask_all(port, questions, filled, requests)

        result["alone"] = ask()
        if jobs:
            result["busy"] = ask_while_busy(url, jobs, ask)
    calls: dict[str, Callable[[Store], object]] = {
        "best": lambda store: store.best(**questions[len(questions) // 2]),
        "jobs": lambda store: store.jobs(before_id=filled // 2),
        "a job's page": lambda store: store.evaluations(filled // 2, limit=50, after_number=2),
    }
    plans = {name: plan(url, call) for name, call in calls.items()}
    return result | {"plans": plans, "indexes": {name: indexes(lines) for name, lines in plans.items()}}


def main() -> None:
    """Print the tables and the plans, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", metavar="URL", help="an empty database, which stays filled")
    parser.add_argument("--trials", type=int, default=10_000, help="finished trials (default 10000)")
    parser.add_argument("--per-job", type=int, default=25, help="trials of each job (default 25)")
    parser.add_argument("--jobs", type=int, default=8, help="jobs that run (default 8)")
    parser.add_argument("--requests", type=int, default=300, help="requests of each kind (default 300)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url = arguments.store
        if url is None:
            server = stack.enter_context(postgresql())
            url = new_database(server.url).render_as_string(hide_password=False)
        found = measure(url, arguments.trials, arguments.per_job, arguments.jobs, arguments.requests)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{found['trials']:,} trials in {found['filled_jobs']:,} jobs, {found['requests']} requests of each kind"
    )
    columns = {"alone": found["alone"]}
    if "busy" in found:
        busy = found["busy"]
        columns[f"beside {found['jobs']} jobs"] = busy["times"]
        print(
            f"{found['jobs']} jobs of {len(BUSY_NFES)} NFE: {busy['trials']} trials, "
            f"{busy['trials_meanwhile']} of them in the {busy['asked_s']:.0f} s of asking; each has its result"
        )
    print(f"  {'':20}" + "".join(f"{name:>20}" for name in columns))
    print(f"  {'':20}" + f"{'median':>10}{'p95':>10}" * len(columns))
    for name in found["alone"]:
        cells = [column[name] for column in columns.values()]
        print(f"  {name:20}" + "".join(f"{c['median_ms']:10.1f}{c['p95_ms']:10.1f}" for c in cells) + " ms")
    for name, lines in found["plans"].items():
        print(f"\nindexes behind {name}: {', '.join(found['indexes'][name]) or 'none'}\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
