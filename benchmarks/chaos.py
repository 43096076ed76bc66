"""Kills what a search runs on, again and again, and compares what it finds with an undisturbed run.

    python -m benchmarks.chaos [--rounds N] [--seed N] [--json]

A PostgreSQL, a Ray head and two Ray nodes run on this machine, each node with a feature cache of its own as if it were
another host. Searches run on them one after the other; at random moments one of these dies by kill -9, in turn:

    worker      the process of a sampler worker
    measuring   the same, amid a call that takes a distance or concludes an evaluation
    driver      the process of `lamtune submit`; `lamtune resume` follows as soon as the store lets it
    node        a Ray node with all its processes and its cache; another one comes some seconds later
    postgresql  the database server with all its processes; it is started again some seconds later

After the rounds every search is run again without disturbance, in another database. The command fails where a search
did not go on by itself (but for the driver), an evaluation is missing, was made twice, or differs, or something is
left running.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import psutil
import yaml
from sqlalchemy import URL

from benchmarks.jobs import GAUSS
from benchmarks.servers import (
    WORKER,
    PostgreSQL,
    RayCluster,
    RayNode,
    new_database,
    postgresql,
    sampler_workers,
    title,
    until,
)
from storage import STALE_S, Evaluation, open_store

KINDS = ("worker", "measuring", "driver", "node", "postgresql")
_MEASURING = ("score", "conclude")
# An exact denoiser, so that a trial of some seconds needs no weights; confirmation and racing included.
JOB: dict[str, Any] = {
    **GAUSS,
    "sampling": {"solver": "ddpm", "nfe": 10},
    "search": {
        "strategy": "paper",
        "images": 20_000,
        "rungs": [2000, 6000],
        "b": {"coarse": 0.05, "fine": 0.01},
    },
    "resources": {"workers": 2, "labels": {"zone": "b"}},
}
_ROUND_S = 120.0  # how long a search may take to get on after a kill


class Failed(Exception):  # noqa: N818 - reads as the sentence it is
    """What was promised did not hold."""


@dataclass
class Site:
    """The servers, and the driver of the search that runs."""

    database: PostgreSQL
    cluster: RayCluster
    folder: Path
    nodes: list[RayNode] = field(default_factory=list)
    driver: subprocess.Popen[bytes] | None = None
    _caches: Iterator[int] = field(default_factory=count)

    def add_node(self) -> None:
        """A node of one processor, with an empty cache."""
        cache = self.folder / f"cache-{next(self._caches)}"
        self.nodes.append(self.cluster.add(cpus=1, LAMTUNE_CACHE=str(cache)))

    def forget(self) -> None:
        """Empty all caches of features."""
        for cache in self.folder.glob("cache-*"):
            shutil.rmtree(cache / "features", ignore_errors=True)

    def run(self, *words: str, store: URL) -> None:
        """Start the driver, `lamtune WORDS --cluster auto`."""
        self.driver = self.cluster.drive(
            *words,
            log=self.folder / "driver.log",
            LAMTUNE_STORE=store.render_as_string(hide_password=False),
            LAMTUNE_CACHE=str(self.folder / "cache-driver"),
        )

    def log(self) -> str:
        """The end of what drivers have printed."""
        return (self.folder / "driver.log").read_text(errors="replace")[-3000:]

    def workers(self) -> list[psutil.Process]:
        """The processes of sampler workers."""
        return [one for node in self.nodes for one in sampler_workers(psutil.Process(node.process.pid))]


@contextmanager
def site() -> Iterator[Site]:
    """Start everything."""
    folder = Path(tempfile.mkdtemp(prefix="lamtune-chaos-"))
    # A node that is gone is noticed within seconds; Ray's own default is a quarter of a minute.
    notice = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    with postgresql() as database:
        cluster = RayCluster({"LAMTUNE_CACHE": str(folder / "cache-head"), **notice})
        found = Site(database, cluster, folder)
        try:
            until(lambda: cluster.living() == 1)
            for number in (2, 3):  # two that start at once may take each other's ports
                found.add_node()
                until(lambda number=number: cluster.living() == number)  # type: ignore[misc]
            yield found
        finally:
            if found.driver is not None and found.driver.poll() is None:
                found.driver.kill()
                found.driver.wait()
            cluster.stop()
            shutil.rmtree(folder, ignore_errors=True)


def kill(found: Site, kind: str, chance: random.Random) -> float | None:
    """Kill one of a kind, and have what would follow follow; returns when, None where the search ended before."""
    if kind == "worker":
        until(lambda: found.workers() or ended(found))
        if not (workers := found.workers()):
            return None
        chance.choice(workers).kill()
    elif kind == "measuring":
        calls = tuple(f"{WORKER}.{call}" for call in _MEASURING)
        measuring: list[psutil.Process] = []
        while not measuring:
            if ended(found):
                return None
            workers, looks = found.workers(), 500  # such a call may be short, and to find workers takes long
            while not measuring and (looks := looks - 1):
                measuring = [worker for worker in workers if title(worker).startswith(calls)]
        measuring[0].kill()
    elif kind == "driver":
        assert found.driver is not None
        found.driver.kill()
        found.driver.wait()
    elif kind == "node":
        found.nodes.pop(chance.randrange(len(found.nodes))).kill()
    else:
        found.database.kill()
    killed = time.monotonic()
    if kind == "node":
        time.sleep(chance.uniform(0, 4))
        found.add_node()
    elif kind == "postgresql":
        time.sleep(chance.uniform(0.5, 5))
        found.database.start()
    return killed


def history(url: URL) -> tuple[Evaluation, ...]:
    """The evaluations of the only job in a store, none where there is no job yet."""
    with open_store(url.render_as_string(hide_password=False), patience=30) as store:
        jobs = store.jobs()
        return store.evaluations(jobs[0].id) if jobs else ()


def progress(url: URL) -> int:
    """Rungs that are in the store."""
    return sum(len(one.rungs) for one in history(url))


def ended(found: Site) -> bool:
    """Whether the search is over; Failed where its driver ended otherwise."""
    assert found.driver is not None
    if found.driver.poll() is None:
        return False
    if found.driver.returncode:
        raise Failed(f"the driver ended with {found.driver.returncode}:\n{found.log()}")
    return True


def resume(found: Site, url: URL) -> None:
    """`lamtune resume` of a job whose driver was killed: it waits until the store takes that one for dead."""
    with open_store(url.render_as_string(hide_password=False), patience=30) as store:
        job = store.jobs()[0]
        stale = timedelta(seconds=STALE_S + 1)
        until(lambda: store.job(job.id).updated_at < datetime.now(UTC) - stale)
    found.run("resume", str(job.id), store=url)


def disturbed(
    found: Site, job: Path, url: URL, kinds: list[str], chance: random.Random
) -> list[dict[str, Any]]:
    """Run a search and kill by `kinds` until they are used up or the search is over. Returns a record of each round."""
    rounds: list[dict[str, Any]] = []
    found.run("submit", str(job), store=url)
    while kinds and not ended(found):
        until(lambda: progress(url) > 0 or ended(found))
        time.sleep(chance.uniform(0, 3))
        if ended(found):
            break
        killed = kill(found, kinds[0], chance)
        if killed is None:
            break
        before = progress(url)
        if kinds[0] == "driver":
            resume(found, url)
        until(lambda before=before: ended(found) or progress(url) > before, _ROUND_S)  # type: ignore[misc]
        rounds.append({"kind": kinds.pop(0), "recovered_s": time.monotonic() - killed})
    until(lambda: ended(found), 10 * _ROUND_S)
    return rounds


def measured(url: URL) -> dict[tuple[Any, ...], Evaluation]:
    """What a store has of every schedule that was not interrupted; Failed where something was made twice or runs."""
    found: dict[tuple[Any, ...], Evaluation] = {}
    text = url.render_as_string(hide_password=False)
    with open_store(text) as store:
        (job,) = store.jobs()
        for one in store.evaluations(job.id):
            if one.state == "running":
                raise Failed(f"evaluation {one.number} is still running")
            if one.state == "failed":
                if not (one.error or "").startswith("interrupted"):
                    raise Failed(f"evaluation {one.number} failed: {one.error}")
                continue
            key = (one.lambdas, one.seed, one.images)
            if key in found:
                raise Failed(f"evaluations {found[key].number} and {one.number} are the same")
            found[key] = one
        study = optuna.load_study(study_name=job.study_name, storage=store.optuna_storage())
        states = {trial.number: trial.state.name for trial in study.trials}
        for one in found.values():
            if states[one.number] != one.state.upper():
                raise Failed(f"evaluation {one.number} is {one.state}, and {states[one.number]} in the study")
        if "RUNNING" in states.values():
            raise Failed("a trial of the study is still running")
    return found


def compare(one: dict[tuple[Any, ...], Evaluation], other: dict[tuple[Any, ...], Evaluation]) -> float:
    """The largest relative difference of two searches' distances; Failed where they tried different schedules."""
    if one.keys() != other.keys():
        raise Failed(f"{len(one.keys() ^ other.keys())} schedules are in one search only")
    largest = 0.0
    for key, mine in one.items():
        theirs = other[key]
        if mine.rungs.keys() != theirs.rungs.keys():
            raise Failed(f"rungs {list(mine.rungs)} and {list(theirs.rungs)} of one schedule")
        for images, distance in mine.rungs.items():
            largest = max(largest, abs(distance / theirs.rungs[images] - 1))
    if largest > 1e-9:
        raise Failed(f"distances differ by {largest:.1e}")
    return largest


def best(url: URL) -> tuple[Any, ...]:
    """What `lamtune best` says."""
    model, sampling = JOB["model"]["name"], JOB["sampling"]
    with open_store(url.render_as_string(hide_password=False)) as store:
        found = store.best(model, JOB["dataset"]["name"], sampling["nfe"])
    return found.k, found.b, found.lambdas


def rounds(kinds: list[str], seed: int = 0, search: dict[str, Any] | None = None) -> dict[str, Any]:
    """Kill once for each of `kinds`, over as many searches as it takes; Failed where a promise did not hold.

    search: changes of the job's `search`. The result is a report of plain numbers.
    """
    chance, left = random.Random(seed), list(kinds)
    report: dict[str, Any] = {"rounds": [], "searches": []}
    with site() as found:
        for number in count():
            if not left:
                return report
            job = found.folder / f"job-{number}.yaml"
            job.write_text(
                yaml.safe_dump({**JOB, "search": JOB["search"] | (search or {}) | {"seed": number}})
            )
            urls = [new_database(found.database.url) for _ in range(2)]
            times = []
            for url, mine in zip(urls, (left, []), strict=True):
                found.forget()
                began, asked = time.monotonic(), len(mine)
                report["rounds"] += disturbed(found, job, url, mine, chance)
                times.append(time.monotonic() - began)
                if asked and len(mine) == asked:
                    raise Failed(f"nothing could be killed in a search of {times[-1]:.0f} s")
            one, other = (measured(url) for url in urls)
            difference = compare(one, other)
            if best(urls[0]) != best(urls[1]):
                raise Failed(f"best: {best(urls[0])} and {best(urls[1])}")
            paid = [sum(e.network_evaluations for e in history(url)) for url in urls]
            report["searches"].append(
                {
                    "evaluations": len(one),
                    "interrupted": len(history(urls[0])) - len(one),
                    "largest_difference": difference,
                    "network_evaluations": paid[0],
                    "undisturbed_network_evaluations": paid[1],
                    "seconds": times[0],
                    "undisturbed_seconds": times[1],
                }
            )
    raise AssertionError


def main() -> None:
    """Print the rounds and the comparison, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="kills (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    kinds = [KINDS[i % len(KINDS)] for i in range(arguments.rounds)]
    try:
        report = rounds(kinds, arguments.seed)
    except Failed as error:
        sys.exit(f"failed: {error}")
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{len(report['rounds'])} kills, all recovered")
    for kind in KINDS:
        taken = sorted(one["recovered_s"] for one in report["rounds"] if one["kind"] == kind)
        if taken:
            median = taken[len(taken) // 2]
            print(
                f"  {kind:10} {len(taken):3} times, went on within {taken[-1]:.0f} s (median {median:.0f} s)"
            )
    for one in report["searches"]:
        again = one["network_evaluations"] / one["undisturbed_network_evaluations"] - 1
        print(
            f"search of {one['evaluations']} evaluations, {one['interrupted']} interrupted: best schedule the same, "
            f"distances differ by {one['largest_difference']:.0e} at most; {one['network_evaluations']:,} network "
            f"evaluations recorded ({100 * again:+.1f} %), {one['seconds']:.0f} s for "
            f"{one['undisturbed_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
