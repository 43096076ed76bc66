"""Times the commands that answer from the store: they must not load torch, Ray or Optuna.

    python -m benchmarks.cli [--json]

Each is a process of its own on a store with one finished search; beside them an empty Python process.
"""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Found, Part, grid, main, milliseconds, scratch, seconds
from benchmarks.jobs import new_job
from samplers.schedule import Schedule
from storage import open_store

_LAMTUNE = "from search.cli import main; main()"


def measure(job: Path, images: int) -> Found:
    """Seconds per command, the median of five."""
    with scratch() as folder:
        url = f"sqlite:///{folder}/store.db"
        _fill(url)
        environment = os.environ | {"LAMTUNE_STORE": url}
        questions = {
            "python, nothing else": ["-c", "pass"],
            "lamtune --help": ["-c", _LAMTUNE, "--help"],
            "lamtune jobs": ["-c", _LAMTUNE, "jobs"],
            "lamtune best": ["-c", _LAMTUNE, "best", "--model", "m", "--dataset", "d", "--nfe", "8"],
        }

        def run(words: list[str]) -> None:
            subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True)

        return {name: seconds(lambda words=words: run(words), 5) for name, words in questions.items()}  # type: ignore[misc]


def _fill(url: str) -> None:
    """One finished job of one trial."""
    with open_store(url) as store:
        job = store.create_job(new_job())
        trial = store.start_evaluation(job.id, 0, "baseline", Schedule.uniform(8, 1.0))
        store.report_rung(trial.id, images=1000, distance=5.0, network_evaluations=8000, seconds=1.0)
        store.finish_evaluation(trial.id)
        store.set_status(job.id, "finished")


def table(found: Found) -> list[str]:
    """A line per command."""
    return grid([[name, milliseconds(taken)] for name, taken in found.items()])


PART = Part("commands", measure, table)

if __name__ == "__main__":
    main({"cli": PART}, __doc__)
