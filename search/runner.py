"""Runs a job on this machine: checks everything, starts Ray and the workers, and one search per NFE.

The order is the promise: whatever can be wrong with a job is found before Ray starts. Knows nothing of how the
command line looks; it prints to the console that it is given.
"""

import _thread
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Literal

import ray
import torch
from rich.console import Console
from rich.progress import Progress

from objectives.reference import Reference
from samplers.errors import InputError, LamtuneError
from samplers.sampling import Solver
from search import pool, tuner
from search.evaluator import Evaluator, accelerator, precision
from search.ms_eps import complete
from search.progress import TerminalWatcher
from search.report import best_as_text
from search.spec import JobSpec
from search.strategies.paper import PaperStrategy
from search.study import Search
from storage import STALE_S, Job, NewJob, Store, open_store
from storage import Evaluator as StoredEvaluator

# A running job says that it lives this often, and is free for another process after this long a silence.
_HEARTBEAT_S, _STALE_S = 5.0, STALE_S


def submit(
    spec: JobSpec, store_url: str | None, console: Console | None = None, *, cluster: bool = False
) -> tuple[Job, ...]:
    """Run every search of a job and return the jobs as the store has them then.

    On this machine; with `cluster`, on the Ray cluster that this machine belongs to, beside other jobs.
    A job that the store has finished is not run again; one that was interrupted goes on. Raises InputError
    before anything starts where the job cannot run, LamtuneError where it went wrong.
    """
    console = console or Console()
    attached = _ray("auto") if cluster else nullcontext()
    with open_store(store_url) as store, store.only_writer(), attached:
        nodes = pool.cluster() if cluster else [pool.this_machine()]
        resources = pool.available(spec, nodes)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            evaluator = Evaluator.load(
                spec, torch.device("cpu"), progress=_shown(bar, "reference statistics")
            )
            if cluster:
                pool.check_files(spec, nodes, spec.files)
            strategies = [strategy(spec, s, evaluator) for s in spec.sampling]
            samplings = complete(
                spec, evaluator.model, accelerator(), _shown(bar, "Γ (ms_eps): network evaluations")
            )
        if cluster:  # Γ may have been estimated into this machine's cache
            whole = spec.model_copy(update={"sampling": tuple(ready.sampling for ready in samplings)})
            pool.check_files(spec, nodes, whole.files)
        jobs = [
            _job(store, spec, asked, ready.ms_eps, evaluator, resources)
            for asked, ready in zip(spec.sampling, samplings, strict=True)
        ]
        todo = [
            (job, ready.sampling, chosen)
            for job, ready, chosen in zip(jobs, samplings, strategies, strict=True)
            if job.status != "finished"
        ]
        reference = evaluator.reference
        del evaluator  # the workers hold their own
        if todo:
            _run(store, spec, reference, todo, resources, console)
        for job in jobs:
            best = store.best(model=job.model, dataset=job.dataset, nfe=job.nfe, solver=job.solver)
            console.print(f"\n{best_as_text(best)}", highlight=False)
        console.print(f"\nstore: {store.safe_url}", highlight=False)
        return tuple(store.job(job.id) for job in jobs)


def _shown(bar: Progress, what: str) -> Callable[[int, int], None]:
    """progress(done, total) as a line of the bar, which appears with the first call."""
    task = bar.add_task(what, visible=False)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def strategy(spec: JobSpec, sampling: Solver, evaluator: Evaluator) -> PaperStrategy:
    """The strategy of one search. Raises InputError that names the key."""
    try:
        return PaperStrategy.of(sampling.nfe, evaluator.model.time, spec.search.b, spec.search.k)
    except InputError as error:
        raise InputError(f"search.{error}") from None


def _job(
    store: Store,
    spec: JobSpec,
    sampling: Solver,
    ms_eps: str | None,
    evaluator: Evaluator,
    resources: pool.Resources,
) -> Job:
    """The store's job of one search, made if it is new: the same question is the same job.

    sampling: as the job file has it. ms_eps: what identifies its Γ, wherever the file of it lies.
    """
    number_type = precision(spec, torch.device(resources.device))
    identity = {
        "model": [spec.model.name, evaluator.model.fingerprint, number_type],
        "evaluator": evaluator.fingerprint,
        "dataset": spec.dataset.name,
        "sampling": asdict(sampling) if ms_eps is None else asdict(sampling) | {"ms_eps": ms_eps},
        "search": spec.search.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{spec.model.name}--{spec.dataset.name}--{sampling.solver}-{sampling.nfe}--{digest}"
    found = store.find_job(name)
    if found is not None:
        return found
    return store.create_job(
        NewJob(
            study_name=name,
            model=spec.model.name,
            model_fingerprint=evaluator.model.fingerprint,
            dataset=spec.dataset.name,
            solver=sampling.solver,
            sampling=asdict(sampling) | {"precision": number_type},
            nfe=sampling.nfe,
            strategy=spec.search.strategy,
            images=spec.search.images,
            seed=spec.search.seed,
            spec=spec.as_dict(),
            evaluator=StoredEvaluator(
                fingerprint=evaluator.fingerprint,
                features=evaluator.extractor.name,
                dimension=evaluator.extractor.dim,
                reference=evaluator.reference.digest,
                details={"reference": evaluator.reference.source, "reference_images": evaluator.reference.n},
            ),
        )
    )


def _run(
    store: Store,
    spec: JobSpec,
    reference: Reference,
    todo: list[tuple[Job, Solver, PaperStrategy]],
    resources: pool.Resources,
    console: Console,
) -> None:
    with (
        _ray("local"),
        console.status(f"starting {resources.workers} {resources.device} worker(s)") as status,
    ):
        workers = pool.start_workers(spec, reference, resources)
        status.stop()
        try:
            for job, sampling, chosen in todo:
                with _claimed(store, job), TerminalWatcher(job, console) as watcher:
                    search = Search(store, job, chosen, watcher)
                    tuner.run_trials(search, workers, sampling, spec.search.all_rungs, _unit(spec, resources))
                    search.check()
        finally:
            pool.stop_workers(workers)


def _unit(spec: JobSpec, resources: pool.Resources) -> int:
    """Images per call: less than usual where the first rung would not occupy all workers."""
    share = -(-spec.search.all_rungs[0] // resources.workers)
    return max(1, min(resources.unit, share))


@contextmanager
def _ray(address: Literal["local", "auto"]) -> Iterator[None]:
    """A Ray of our own on this machine or the cluster's, silent unless it fails; or the one that this process has."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    no_dashboard = False if address == "local" else None  # of a cluster that runs it is not asked
    try:
        ray.init(
            address=address, include_dashboard=no_dashboard, log_to_driver=False, logging_level=logging.ERROR
        )
    except ConnectionError as error:
        raise InputError(f"--cluster {address}: this machine belongs to no Ray cluster: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _claimed(store: Store, job: Job) -> Iterator[None]:
    """Hold a job while it runs, with a heartbeat, and record how it ended."""
    if not store.claim(job.id, stale_after=_STALE_S):
        raise LamtuneError(
            f"job {job.id} is being run by another process; if that one was killed, try again in {_STALE_S:.0f} s"
        )
    ended, cancelled = threading.Event(), threading.Event()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_S):
            with suppress(LamtuneError):  # a database that is away for a while is no reason to stop
                if store.heartbeat(job.id) == "cancelled":
                    cancelled.set()
                    # As `kill` does it; Ray leaves through SystemExit. SIGINT is blocked in jobs of a cluster.
                    _thread.interrupt_main(signal.SIGTERM)
                    return

    heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heart.start()
    try:
        yield
    except BaseException as error:
        _stop(ended, heart)
        if cancelled.is_set():
            store.set_status(job.id, "cancelled", "cancelled on request")
            raise LamtuneError(f"job {job.id} was cancelled; submit it again to go on") from None
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        store.set_status(job.id, "cancelled" if interrupted else "failed", str(error) or type(error).__name__)
        raise
    _stop(ended, heart)
    store.set_status(job.id, "finished")


def _stop(ended: threading.Event, heart: threading.Thread) -> None:
    ended.set()
    heart.join()
