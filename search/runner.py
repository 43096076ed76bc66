"""Runs a job on this machine: checks everything, starts Ray and the workers, and one search per NFE.

The order is the promise: whatever can be wrong with a job is found before Ray starts. Knows nothing of how the
command line looks; it prints to the console that it is given.
"""

import _thread
import hashlib
import json
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from objectives.losses import LOSSES
from objectives.metrics import check, need_real
from objectives.reference import Reference, has_images
from samplers.errors import InputError, LamtuneError
from samplers.sampling import Solver
from search import dashboard, planning, pool, tuner
from search.evaluator import Evaluator, accelerator, precision
from search.ms_eps import Complete, complete
from search.planning import Start
from search.progress import TerminalWatcher
from search.report import best_as_text, exploration, runner_up
from search.spec import FRECHET, JobSpec, SearchSpec, from_dict
from search.strategies.base import Strategy
from search.study import Search
from storage import STALE_S, ConnectionLost, Job, JobStatus, NewJob, NotInStore, Store, TakenOver, open_store
from storage import Evaluator as StoredEvaluator

_T = TypeVar("_T")

# A running job says that it lives this often, and is free for another process after this long a silence.
_HEARTBEAT_S, _STALE_S = 5.0, STALE_S
# So long a job waits for a database that went away, and no oftener than this in that time.
_PATIENCE_S, _LOSSES = 60.0, 5


def submit(
    spec: JobSpec, store_url: str | None, console: Console | None = None, *, cluster: bool = False
) -> tuple[Job, ...]:
    """Run every search of a job and return the jobs as the store has them then.

    On this machine; with `cluster`, on the Ray cluster that this machine belongs to, beside other jobs.
    A job that the store has finished is not run again; one that was interrupted goes on. Raises InputError
    before anything starts where the job cannot run, LamtuneError where it went wrong.
    """
    return _submit(spec, None, store_url, console, cluster)


def resume(
    job_id: int, store_url: str | None, console: Console | None = None, *, cluster: bool = False
) -> tuple[Job, ...]:
    """Have one job of the store go on, from what the store has of its job file; see `submit`.

    Raises InputError where a file of the job is not what it was when the job began.
    """
    with open_store(store_url) as store:
        job = store.job(job_id)
    spec = from_dict(job.spec, f"job {job_id}")
    sampling = {key: value for key, value in job.sampling.items() if key != "precision"}
    mine = tuple(one for one in spec.sampling if json.loads(json.dumps(asdict(one))) == sampling)
    return _submit(spec.model_copy(update={"sampling": mine[:1]}), job, store_url, console, cluster)


def _submit(
    spec: JobSpec, job: Job | None, store_url: str | None, console: Console | None, cluster: bool
) -> tuple[Job, ...]:
    """job: the one that `spec` must be; None: whatever the store makes of it."""
    console = console or Console()
    attached = pool.connected("auto") if cluster else nullcontext()
    with open_store(store_url, patience=_PATIENCE_S) as store, store.only_writer(), attached:
        nodes = pool.cluster() if cluster else [pool.this_machine()]
        resources = pool.available(spec, nodes)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            evaluator = Evaluator.load(
                spec, torch.device("cpu"), progress=_shown(bar, "reference statistics")
            )
            if cluster:
                pool.check_files(spec, nodes, spec.files)
            real = _real(spec, evaluator, _shown(bar, "features of the real images"))
            for sampling in spec.sampling:  # whatever is wrong with the search is said before Γ is estimated
                planning.strategy(spec.search, sampling, evaluator.model.time, evaluator.extractor.dim)
            samplings = complete(
                spec, evaluator.model, accelerator(), _shown(bar, "Γ (ms_eps): network evaluations")
            )
        if cluster:  # Γ may have been estimated into this machine's cache
            whole = spec.model_copy(update={"sampling": tuple(ready.sampling for ready in samplings)})
            pool.check_files(spec, nodes, whole.files)
        searches = [
            _lasting(partial(_search, store, spec, asked, ready, evaluator, resources, job, real))
            for asked, ready in zip(spec.sampling, samplings, strict=True)
        ]
        jobs = [one.job for one in searches]
        todo = [one for one in searches if one.job.status != "finished"]
        reference, fingerprint = evaluator.reference, evaluator.model.fingerprint
        del evaluator  # the workers hold their own
        if todo:
            pool.trim_caches(spec, nodes)
            _run(store, spec, reference, fingerprint, todo, resources, console)
        for job in jobs:
            answer = _lasting(partial(_result, store, job, spec.search))
            console.print(f"\n{answer}", highlight=False, soft_wrap=True)
        console.print(f"\nstore: {store.safe_url}", highlight=False, soft_wrap=True)
        return _lasting(lambda: tuple(store.job(job.id) for job in jobs))


def _result(store: Store, job: Job, search: SearchSpec) -> str:
    """The answer to a job's question, and what is to be known of its search."""
    best = store.best(model=job.model, dataset=job.dataset, nfe=job.nfe, solver=job.solver)
    lines = [best_as_text(best, runner_up(best, store.evaluations(best.job_id)))]
    if best.job_id == job.id and (edge := planning.at_the_edge(search, best)) is not None:
        lines.append(f"  {edge}")
    if (saved := warm_start_as_text(store, store.job(job.id))) is not None:
        lines.append(saved)
    return "\n".join(lines)


def _shown(bar: Progress, what: str) -> Callable[[int, int], None]:
    """progress(done, total) as a line of the bar, which appears with the first call."""
    task = bar.add_task(what, visible=False)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _real(spec: JobSpec, evaluator: Evaluator, progress: Callable[[int, int], None]) -> str | None:
    """Check the job's objective and metrics, and cache the real images' features for the workers where one needs them;
    returns the digest of those that the reference statistics are not of. Raises InputError."""
    names = (*spec.losses, *spec.metrics)
    if not names:
        return None
    images = has_images(spec.dataset.images or spec.dataset.reference)
    logits = evaluator.extractor.head is not None
    check("metrics", spec.metrics, real=images, logits=logits)
    check("objective", spec.losses, real=images, logits=logits)
    if spec.losses and not LOSSES[spec.objective].error_bars and spec.search.strategy != "paper":
        raise InputError(
            f"objective: {spec.objective} has no error bars, which search.strategy {spec.search.strategy} needs: "
            "give strategy: paper"
        )
    if not need_real(names):
        return None
    _, digest = evaluator.real(spec.dataset, progress)
    return digest if spec.dataset.images is not None else None


def _fingerprint(spec: JobSpec, evaluator: Evaluator, real: str | None) -> str:
    """What makes two distances comparable; real: see `_real`."""
    if spec.objective == FRECHET:
        return evaluator.fingerprint
    return _digest([evaluator.fingerprint, spec.objective, real])


@dataclass(frozen=True, slots=True)
class _Search:
    """One search of a job. sampling: with the file of Γ, if it needs one. strategy: by where it starts. context: see
    `study.Search`."""

    job: Job
    sampling: Solver
    strategy: Callable[[Start | None], Strategy]
    context: str


def _search(
    store: Store,
    spec: JobSpec,
    asked: Solver,
    ready: Complete,
    evaluator: Evaluator,
    resources: pool.Resources,
    resumed: Job | None,
    real: str | None,
) -> _Search:
    """The store's job of one search, made if it is new: the same question is the same job.

    asked: the sampling as the job file has it. ready: the same with Γ, wherever the file of it lies. resumed: the job
    that it must be; raises InputError where it is not. real: see `_real`.
    """
    number_type = precision(spec, torch.device(resources.device))
    fingerprint = _fingerprint(spec, evaluator, real)
    sampling = asdict(asked) if ready.ms_eps is None else asdict(asked) | {"ms_eps": ready.ms_eps}
    numbers = {
        "model": [evaluator.model.fingerprint, number_type],
        "evaluator": fingerprint,
        "sampling": sampling,
    }
    if real is not None:
        numbers["real"] = real
    identity = {
        "numbers": numbers,
        "names": [spec.model.name, spec.dataset.name],
        "search": spec.search.model_dump(mode="json"),
    }
    if spec.metrics:
        identity["metrics"] = sorted(spec.metrics)
    name = (
        f"{spec.model.name}--{spec.dataset.name}--{asked.solver}-{asked.nfe}--{spec.search.strategy}-"
        f"{_digest(identity)[:8]}"
    )
    if resumed is not None and name != resumed.study_name:
        raise InputError(_difference(resumed, spec, evaluator, fingerprint, number_type))
    job = store.find_job(name)
    if job is None:
        job = store.create_job(
            NewJob(
                study_name=name,
                model=spec.model.name,
                model_fingerprint=evaluator.model.fingerprint,
                dataset=spec.dataset.name,
                solver=asked.solver,
                sampling=asdict(asked) | {"precision": number_type},
                nfe=asked.nfe,
                strategy=spec.search.strategy,
                images=spec.search.images,
                confirm=spec.search.confirm_images,
                seed=spec.search.seed,
                spec=spec.as_dict(),
                evaluator=StoredEvaluator(
                    fingerprint=fingerprint,
                    features=evaluator.extractor.name,
                    dimension=evaluator.extractor.dim,
                    reference=evaluator.reference.digest,
                    details={
                        "reference": evaluator.reference.source,
                        "reference_images": evaluator.reference.n,
                    }
                    | ({} if spec.objective == FRECHET else {"objective": LOSSES[spec.objective].label}),
                ),
                versions=_versions(resources.device),
            )
        )
    time, dimension = evaluator.model.time, evaluator.extractor.dim

    def strategy(start: Start | None) -> Strategy:
        return planning.strategy(spec.search, asked, time, dimension, start)

    return _Search(job, ready.sampling, strategy, _digest(numbers))


def _difference(job: Job, spec: JobSpec, evaluator: Evaluator, fingerprint: str, number_type: str) -> str:
    """Why a job cannot go on: what it would measure now does not compare with what it has measured."""
    if job.model_fingerprint != evaluator.model.fingerprint:
        files = [f"{key} ({path})" for key, path in spec.files.items() if key.startswith("model.")]
        reason = f"{' or '.join(files) or 'model'} has changed since"
    elif job.evaluator.reference != evaluator.reference.digest:
        reason = f"dataset.reference ({spec.dataset.reference}) has changed since"
    elif job.evaluator.fingerprint != fingerprint:
        reason = f"features ({spec.features}), or the real images, have changed since"
    elif job.sampling["precision"] != number_type:
        reason = (
            f"it was begun in {job.sampling['precision']}, and here model.precision would be {number_type}"
        )
    else:
        reason = "the file of Γ (sampling.ms_eps) has changed since, or another version of lamtune began it"
    return f"job {job.id} cannot go on: {reason}; `lamtune submit` its job file to begin anew"


def _versions(device: str) -> dict[str, str]:
    """What ran a job, for those who want to run it again."""
    found = {"python": platform.python_version()}
    for name in ("lamtune", "torch", "numpy", "optuna", "ray"):
        with suppress(PackageNotFoundError):  # run from its folder
            found[name] = version(name)
    found["device"] = (
        torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
    )
    return found


def _start(store: Store, spec: JobSpec, number: int) -> Start | None:
    """Where the search of a job begins, or began: looked up once, when its first trial is due, so that it can be what
    the search before it has found."""
    job = store.job(number)
    if job.warm_start is not None:
        return Start(**job.warm_start)
    if not spec.search.warm_start or store.evaluations(number, limit=1):
        return None
    start = warm_start(store, job)
    if start is not None:
        store.note_warm_start(number, asdict(start))
    return start


def warm_start(store: Store, new: Job) -> Start | None:
    """The best schedule of the most alike finished job: the same network at another NFE, the nearest one, else another
    network on the same data; of the same solver and evaluator in any case. None where there is none, or for the
    paper's protocol, which begins at λ = 1."""
    if new.strategy == "paper":
        return None

    def distance(job: Job) -> tuple[bool, float, int]:
        other = job.model_fingerprint != new.model_fingerprint
        return other, abs(math.log(job.nfe / new.nfe)), -job.id

    for job in sorted(store.alike(new.dataset, new.solver, new.evaluator.fingerprint), key=distance):
        with suppress(NotInStore):
            best = store.best_of(job.id)
            if best.k is not None and not best.parameters:
                mean = best.b + best.k * (best.nfe - 1) / 2 if best.b is not None else 1.0
                return Start(mean=round(mean, 9), k=best.k, nfe=best.nfe, job=best.job_id)
    return None


def warm_start_as_text(store: Store, job: Job) -> str | None:
    """What a job that began at another one's best schedule has spent on exploring, next to that one."""
    if job.warm_start is None:
        return None
    other = job.warm_start["job"]
    mine, theirs = (
        exploration(store.evaluations(number), nfe)
        for number, nfe in ((job.id, job.nfe), (other, store.job(other).nfe))
    )
    return (
        f"  began at the best of job {other}: explored with {mine:,} images, where that one took {theirs:,}"
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _run(
    store: Store,
    spec: JobSpec,
    reference: Reference,
    fingerprint: str,
    todo: list[_Search],
    resources: pool.Resources,
    console: Console,
) -> None:
    with (
        pool.connected("local"),
        console.status(f"starting {resources.workers} {resources.device} worker(s)") as status,
    ):
        workers = pool.start_workers(spec, reference, fingerprint, resources)
        status.stop()
        try:
            for one in todo:
                with _claimed(store, one.job), TerminalWatcher(one.job, console) as watcher:
                    strategy = one.strategy(_lasting(partial(_start, store, spec, one.job.id)))

                    def search(
                        one: _Search = one, strategy: Strategy = strategy, watcher: TerminalWatcher = watcher
                    ) -> None:
                        with store.errors():
                            found = Search(
                                store,
                                one.job,
                                strategy,
                                watcher,
                                rungs=spec.search.all_rungs,
                                context=one.context,
                                metrics=spec.metrics,
                            )
                            tuner.run_trials(found, workers, one.sampling, resources.unit)
                            found.check()

                    _lasting(search)
                _lasting(partial(dashboard.publish, store, one.job.id))
        finally:
            pool.stop_workers(workers)


def _lasting(call: Callable[[], _T]) -> _T:
    """What a call returns that may be made twice, again where the database went away amid a transaction of it.

    A search may: the store has what counts, so that it goes on as after a kill, but for the workers, which stay.
    """
    lost: list[float] = []
    while True:
        try:
            return call()
        except ConnectionLost:
            now = time.monotonic()
            lost = [*(then for then in lost if now - then < _PATIENCE_S), now]
            if len(lost) > _LOSSES:
                raise


@contextmanager
def _claimed(store: Store, job: Job) -> Iterator[None]:
    """Hold a job while it runs, with a heartbeat, and record how it ended."""
    if not _lasting(partial(store.claim, job.id, stale_after=_STALE_S)):
        raise LamtuneError(
            f"job {job.id} is being run by another process; if that one was killed, try again in {_STALE_S:.0f} s"
        )
    ended, stop, asked = threading.Event(), threading.Event(), threading.Event()
    taken: list[TakenOver] = []

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_S):
            try:
                if store.heartbeat(job.id) == "cancelled":
                    stop.set()
            except TakenOver as error:
                taken.append(error)
            except LamtuneError:  # a database that is away for a while is no reason to stop
                pass
            # As `kill` does it, for SIGINT is blocked in jobs of a cluster; every heartbeat again until it is heard:
            # what is raised while Python finalises an object is lost.
            if taken or stop.is_set() or asked.is_set():
                _thread.interrupt_main(signal.SIGTERM)

    def end(status: JobStatus, error: str | None = None) -> None:
        _lasting(lambda: store.set_status(job.id, status, error))

    heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heart.start()
    try:
        with _ended_by_sigterm(asked):
            yield
    except BaseException as error:
        _stop(ended, heart)
        if taken or isinstance(error, TakenOver):  # what becomes of the job is the other process's to say
            raise next(iter(taken), error) from None
        if stop.is_set():
            end("cancelled", "cancelled on request")
            raise LamtuneError(f"job {job.id} was cancelled; submit it again to go on") from None
        if isinstance(error, KeyboardInterrupt | SystemExit):
            end("cancelled", "stopped by SIGTERM" if asked.is_set() else "stopped by Ctrl-C")
        else:
            end("failed", str(error) or type(error).__name__)
        raise
    _stop(ended, heart)
    end("finished")


@contextmanager
def _ended_by_sigterm(asked: threading.Event) -> Iterator[None]:
    """Leave through SystemExit at a SIGTERM, as Ray does, and note it."""

    def leave(number: int, frame: object) -> None:
        asked.set()
        sys.exit(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(ended: threading.Event, heart: threading.Thread) -> None:
    ended.set()
    heart.join()
