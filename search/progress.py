"""Shows a running search in the terminal: a line per finished trial, and a bar with images and time left.

Knows nothing of strategies or Ray: it is told what starts, gets on and ends.
"""

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from search.report import amount, duration, error_bar, gain, number
from storage import CONFIRM, Evaluation, Job


class TerminalWatcher:
    """A `search.study.Watcher` for one job; use it as a context manager while the job runs.

    Where the output is no terminal, only the lines appear.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self._job, self._console = job, console
        self._parameters = tuple(job.spec.get("search", {}).get("parameters", ()))
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
        self._expected = 0
        self._ended = 0  # trials that ended here
        self._began: float | None = None

    def __enter__(self) -> Self:
        self._console.print(
            f"job {self._job.id}: {self._job.model} on {self._job.dataset}, {self._job.solver}, "
            f"NFE {self._job.nfe}, {self._job.images:,} images a trial; distance: {self._job.evaluator.objective}",
            soft_wrap=True,
        )
        more = "".join(f"{name:>9}  " for name in self._parameters)
        self._console.print(
            f"{'trial':>5}  {'phase':8}  {'mean λ':>8}  {'k':>9}  {more}{'images':>7}  "
            f"{'distance':>9} {'±':7} {'gain over λ = 1':20}  {'time':>6}",
            soft_wrap=True,
        )
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, evaluation: Evaluation, images: int, expected: int) -> None:
        """See `search.study.Watcher`."""
        self._began = self._began or time.monotonic()
        self._expected = expected
        self._bar.update(self._task, total=images)
        self._show(evaluation, 0)

    def progressed(self, evaluation: Evaluation, images: int) -> None:
        """See `search.study.Watcher`."""
        self._show(evaluation, images)

    def ended(self, evaluation: Evaluation) -> None:
        """See `search.study.Watcher`."""
        self._ended += 1
        if evaluation.distance is not None and evaluation.state != "failed":
            result = f"{amount(evaluation.distance):>9} {error_bar(evaluation.standard_error):<7} {gain(evaluation)}"
            if evaluation.gain is not None and evaluation.phase == CONFIRM:
                self._best = min(evaluation.distance, self._best or math.inf)
        else:
            result = f"{evaluation.state}: {evaluation.error}"
        assert evaluation.finished_at is not None
        k = number(None if evaluation.k is None else round(evaluation.k, 6))
        tried = (number(evaluation.parameters.get(name)) for name in self._parameters)
        more = "".join(f"{value:>9}  " for value in tried)
        wall = (evaluation.finished_at - evaluation.started_at).total_seconds()
        self._console.print(
            f"{evaluation.number:5}  {evaluation.phase:8}  {evaluation.mean:8.5g}  {k:>9}  {more}"
            f"{evaluation.images:>7,}  {result:<39}  {duration(wall):>6}",
            highlight=False,
            soft_wrap=True,
        )

    def _show(self, evaluation: Evaluation, images: int) -> None:
        best = "" if self._best is None else f" · best {amount(self._best)}"
        self._bar.update(
            self._task,
            completed=images,
            description=f"trial {evaluation.number} of about {self._expected - 1} · {evaluation.phase}{best}",
            left=self._left(evaluation, images),
        )

    def _left(self, evaluation: Evaluation, images: int) -> str:
        if self._began is None or not self._ended:
            return "time left unknown"
        todo = max(self._expected - evaluation.number, 1)
        return f"about {duration((time.monotonic() - self._began) / self._ended * todo)} left"
