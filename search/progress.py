"""Shows a running search in the terminal: a line per finished trial, and a bar with images and time left.

Knows nothing of strategies or Ray: it is told what starts, gets on and ends.
"""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from search.report import duration, number
from storage import Evaluation, Job


class TerminalWatcher:
    """A `search.study.Watcher` for one job; use it as a context manager while the job runs.

    Where the output is no terminal, only the lines appear.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self._job, self._console = job, console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images · {task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=job.images, left="")
        self._best: float | None = None
        self._ended = 0
        self._expected = 0
        self._paid = 0  # images of the trials that ended here
        self._began: float | None = None

    def __enter__(self) -> Self:
        self._console.print(
            f"job {self._job.id}: {self._job.model} on {self._job.dataset}, {self._job.solver}, "
            f"NFE {self._job.nfe}, {self._job.images:,} images a trial"
        )
        self._console.print(f"{'trial':>5}  {'phase':8}  {'b':>8}  {'k':>9}  {'distance':>9}  {'time':>6}")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, evaluation: Evaluation, expected: int) -> None:
        """See `search.study.Watcher`."""
        self._began = self._began or time.monotonic()
        self._expected = expected
        self._ended = evaluation.number
        self._show(evaluation, 0)

    def progressed(self, evaluation: Evaluation, images: int) -> None:
        """See `search.study.Watcher`."""
        self._show(evaluation, images)

    def ended(self, evaluation: Evaluation) -> None:
        """See `search.study.Watcher`."""
        self._paid += evaluation.images
        if evaluation.state == "complete":
            assert evaluation.distance is not None
            result = f"{evaluation.distance:9.4f}"
            if self._best is None or evaluation.distance < self._best:
                self._best = evaluation.distance
                result += "  *"
        else:
            result = f"{evaluation.state}: {evaluation.error}"
        assert evaluation.finished_at is not None
        wall = (evaluation.finished_at - evaluation.started_at).total_seconds()
        self._console.print(
            f"{evaluation.number:5}  {evaluation.phase:8}  {number(evaluation.b):>8}  {number(evaluation.k):>9}  "
            f"{result:<12}  {duration(wall):>6}",
            highlight=False,
        )

    def _show(self, evaluation: Evaluation, images: int) -> None:
        best = "" if self._best is None else f" · best {self._best:.3f}"
        self._bar.update(
            self._task,
            completed=images,
            description=f"trial {evaluation.number} of about {self._expected - 1} · {evaluation.phase}{best}",
            left=self._left(evaluation, images),
        )

    def _left(self, evaluation: Evaluation, images: int) -> str:
        done = self._paid + images
        if self._began is None or not done:
            return "time left unknown"
        todo = max(self._expected - evaluation.number, 1) * self._job.images - images
        return f"about {duration((time.monotonic() - self._began) / done * todo)} left"
