"""The store: opens the database, keeps jobs and evaluations, finds the best schedule.

Knows nothing of how an evaluation is made.

One process writes per job (see `Store.claim`); any number read. Values go in and come out as the frozen
dataclasses of `records`; no SQLAlchemy object leaves. Every write is one short transaction of its own, so
after a kill -9 the store holds everything that was reported.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from difflib import SequenceMatcher
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from sqlalchemy import URL, ColumnElement, CursorResult, Select, and_, func, or_, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from samplers.errors import InputError, LamtuneError
from samplers.schedule import Schedule
from storage import upgrade
from storage.connection import default_url, driver_options, make_engine, parse, redacted, safe, wait_for
from storage.errors import ConnectionLost, NotInStore, TakenOver
from storage.lock import only_writer
from storage.records import (
    CONFIRM,
    Best,
    Evaluation,
    EvaluationState,
    Evaluator,
    Job,
    JobStatus,
    NewJob,
    alive,
)
from storage.tables import DiagnosisRow, EvaluationRow, EvaluatorRow, JobRow, PictureRow

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

_S = TypeVar("_S", bound=Select[*tuple[Any, ...]])

_OVER = ("finished", "failed", "cancelled")
_HELD = (JobRow.status == "running") | ((JobRow.status == "cancelled") & JobRow.finished_at.is_(None))
_NEAREST = 8  # how many combinations NotInStore names


def open_store(url: str | None = None, *, patience: float = 0.0) -> "Store":
    """Open the store at `url` and bring its tables up to date.

    The default is LAMTUNE_STORE, else sqlite:///lamtune.db. `sqlite:///FILE` is made if it does not exist;
    `postgresql://USER:PASSWORD@HOST/NAME` must. Use it as a context manager, or call `close`. InputError
    where the URL cannot be read, opened or written, psycopg is missing, or a newer lamtune has been there.

    patience: seconds to wait, once it is open, for a database that has gone away; also in Optuna's calls.
    """
    return Store(parse(url or default_url()), patience)


def check_store(url: str | None = None) -> str:
    """The schema version of the store at `url`, which is not changed, if it is this lamtune's.

    LamtuneError where its tables are older, or missing; InputError as `open_store`.
    """
    parsed = parse(url or default_url())
    if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
        raise LamtuneError(
            f"the store {safe(parsed)} does not exist yet: the first command that opens it makes it"
        )
    engine = make_engine(parsed)
    try:
        with _opening(parsed), engine.begin() as connection:
            found = upgrade.version(connection)
            upgrade.refuse_newer(found, safe(parsed))
    finally:
        engine.dispose()
    if found != upgrade.HEAD:
        raise LamtuneError(
            f"the store {safe(parsed)} has schema version {found or 'none'} and this lamtune uses {upgrade.HEAD}: "
            "`lamtune store upgrade`, or the next command that opens it, brings it there"
        )
    return found


@contextmanager
def _opening(url: URL) -> Iterator[None]:
    """The database's errors come out as InputError that the store cannot be opened."""
    failure: Exception | None = None
    try:
        yield
    except (SQLAlchemyError, OSError, UnicodeError) as error:
        failure = error
    if failure is not None:  # raised out here, so that the driver's error is not chained
        raise InputError(f"the store {safe(url)} cannot be opened: {redacted(url, failure)}")


class _Cost(NamedTuple):
    trials: int = 0
    network_evaluations: int = 0
    seconds: float = 0.0


class Store:
    """An open store; may be used from several threads. Make it with `open_store`."""

    def __init__(self, url: URL, patience: float = 0.0) -> None:
        self._url, self._patience = url, patience
        self._attempts: dict[int, int] = {}  # of the jobs that were claimed here
        self._optuna: RDBStorage | None = None
        self._making_optuna = Lock()
        self._readers = make_engine(url)
        self._writers = self._readers.execution_options(write=True)
        try:
            self._upgrade()
            wait_for(self._readers, patience)
        except BaseException:
            self.close()
            raise

    @property
    def safe_url(self) -> str:
        """The database's URL without its password."""
        return safe(self._url)

    def __repr__(self) -> str:
        return f"Store({self.safe_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; what was got from `optuna_storage` stays usable."""
        self._readers.dispose()
        if self._optuna is not None:
            self._optuna.engine.dispose()

    def only_writer(self) -> AbstractContextManager[None]:
        """Hold the store while a search writes to it; see `lock.only_writer`."""
        return only_writer(self._url)

    def _upgrade(self) -> None:
        with _opening(self._url), self._writers.begin() as connection:
            found = upgrade.version(connection)
            upgrade.refuse_newer(found, self.safe_url)
            if found == upgrade.HEAD:
                upgrade.check_writable(connection)
            else:
                upgrade.upgrade(connection, self.safe_url)

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[Session]:
        """One transaction; see `errors`."""
        engine = self._writers if write else self._readers
        with self.errors(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The database's errors come out as LamtuneError, also those of Optuna's calls; as ConnectionLost where it
        went away amid a transaction. A signal that asks the process to end does so, whatever a driver makes of it."""
        handled = sys.exc_info()[1]
        try:
            yield
        except Exception as error:
            if (asked := _asked_to_end(error, handled)) is not None:
                raise asked from None
            # Optuna's own error for what happens in its storage has SQLAlchemy's as its cause.
            origin = error if isinstance(error, SQLAlchemyError) else error.__cause__
            if not isinstance(origin, SQLAlchemyError):
                raise
            kind = ConnectionLost if getattr(origin, "connection_invalidated", False) else LamtuneError
            raise kind(f"the store {self.safe_url} failed: {redacted(self._url, origin)}") from None

    def now(self) -> datetime:
        """The time by the clock that all times in the store are of: a server's own, which the clocks of the hosts that
        write to it need not agree with, or this machine's for a file. UTC."""
        with self._session() as session:
            return self._now(session)

    def _now(self, session: Session) -> datetime:
        clock = self._clock()
        return clock if isinstance(clock, datetime) else session.scalars(select(clock)).one().astimezone(UTC)

    def _clock(self) -> datetime | ColumnElement[datetime]:
        """See `now`; of a server as what a statement may hold, which then needs no other before it."""
        sqlite = self._url.get_backend_name() == "sqlite"
        return datetime.now(UTC) if sqlite else func.clock_timestamp()

    # ---- jobs

    def create_job(self, new: NewJob) -> Job:
        """Add a queued job; InputError if its study name is taken."""
        with self._session(write=True) as session:
            now = self._now(session)
            if (taken := self._by_study(session, new.study_name)) is not None:
                raise InputError(
                    f"the store {self.safe_url} has the study {new.study_name!r} already, as job {taken.id}"
                )
            row = JobRow(
                study_name=new.study_name,
                model=new.model,
                model_fingerprint=new.model_fingerprint,
                dataset=new.dataset,
                solver=new.solver,
                sampling=dict(new.sampling),
                nfe=new.nfe,
                strategy=new.strategy,
                images=new.images,
                seed=new.seed,
                spec=dict(new.spec),
                evaluator=self._evaluator(session, new.evaluator),
                confirm=new.confirm,
                versions=dict(new.versions),
                status="queued",
                created_at=now,
                updated_at=now,
            )
            session.add(row)
            session.flush()
            return row.record()

    @staticmethod
    def _evaluator(session: Session, evaluator: Evaluator) -> EvaluatorRow:
        """The evaluator's row, added if need be; another process may add the same one at the same time."""
        known = select(EvaluatorRow).where(EvaluatorRow.fingerprint == evaluator.fingerprint)
        if (row := session.scalars(known).first()) is not None:
            return row
        row = EvaluatorRow(
            fingerprint=evaluator.fingerprint,
            features=evaluator.features,
            dimension=evaluator.dimension,
            reference=evaluator.reference,
            details=dict(evaluator.details),
        )
        try:
            with session.begin_nested():
                session.add(row)
        except IntegrityError:
            return session.scalars(known).one()
        return row

    @staticmethod
    def _by_study(session: Session, study_name: str) -> JobRow | None:
        return session.scalars(select(JobRow).where(JobRow.study_name == study_name)).first()

    def _job(self, session: Session, job_id: int) -> JobRow:
        row = session.get(JobRow, job_id)
        if row is None:
            raise NotInStore(
                f"the store {self.safe_url} has no job {job_id}: `lamtune jobs` lists those it has"
            )
        return row

    def _own_job(self, session: Session, job_id: int) -> JobRow:
        """A job to change, locked; TakenOver if it was claimed here and has been claimed elsewhere since."""
        row = session.get(JobRow, job_id, with_for_update={"of": JobRow})
        if row is None:
            return self._job(session, job_id)
        if row.attempt != self._attempts.get(job_id, row.attempt):
            raise TakenOver(
                f"job {job_id} was taken over by another process, as this one gave no sign of life"
            )
        return row

    def _sign_of_life(self, session: Session, job_id: int) -> None:
        """Note that a job lives, in one statement; raises as `_own_job`."""
        attempt = self._attempts.get(job_id, JobRow.attempt)
        mine = update(JobRow).where(JobRow.id == job_id, JobRow.attempt == attempt)
        noted = session.execute(
            mine.values(updated_at=self._clock()).execution_options(synchronize_session=False)
        )
        assert isinstance(noted, CursorResult)
        if not noted.rowcount:
            self._own_job(session, job_id)

    def job(self, job_id: int) -> Job:
        """One job; NotInStore if there is none with that id."""
        with self._session() as session:
            return self._job(session, job_id).record()

    def find_job(self, study_name: str) -> Job | None:
        """The job of an Optuna study, None if there is none: what a resumed search asks first."""
        with self._session() as session:
            row = self._by_study(session, study_name)
            return None if row is None else row.record()

    def jobs(
        self,
        model: str | None = None,
        dataset: str | None = None,
        status: JobStatus | None = None,
        limit: int = 50,
        before_id: int | None = None,
    ) -> tuple[Job, ...]:
        """The newest jobs first, at most `limit`; for the next page give the last one's id as `before_id`."""
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        if model is not None:
            query = query.where(JobRow.model == model)
        if dataset is not None:
            query = query.where(JobRow.dataset == dataset)
        if status is not None:
            query = query.where(JobRow.status == status)
        if before_id is not None:
            query = query.where(JobRow.id < before_id)
        with self._session() as session:
            return tuple(row.record() for row in session.scalars(query))

    def alike(self, dataset: str, solver: str, evaluator: str) -> tuple[Job, ...]:
        """The finished jobs on a dataset with a solver whose distances are those of one evaluator (its fingerprint)."""
        query = (
            select(JobRow)
            .join(JobRow.evaluator)
            .where(
                JobRow.dataset == dataset,
                JobRow.solver == solver,
                JobRow.status == "finished",
                EvaluatorRow.fingerprint == evaluator,
            )
            .order_by(JobRow.id)
        )
        with self._session() as session:
            return tuple(row.record() for row in session.scalars(query))

    def set_status(self, job_id: int, status: JobStatus, error: str | None = None) -> Job:
        """Move a job to `status`, with a text for people if it failed; NotInStore if it is not there.

        Raises TakenOver, as every write to a job or its evaluations does from a store that has claimed the job, once
        another process has claimed it too.
        """
        with self._session(write=True) as session:
            now = self._now(session)
            row = self._own_job(session, job_id)
            row.status, row.error, row.updated_at = status, error, now
            row.finished_at = now if status in _OVER else None
            session.flush()
            return row.record()

    def claim(self, job_id: int, *, stale_after: float) -> bool:
        """Make the caller the job's one writer, and the job running; False if another process holds it.

        A running job is held while its last sign of life (`Job.updated_at`) is younger than `stale_after`
        seconds (see `records.alive`), so call `heartbeat` more often than that; one that is being cancelled, until its
        process has said so. One statement decides, so of two callers one gets the job; who held it before can no longer
        write to it (TakenOver). NotInStore if there is no such job.
        """
        with self._session(write=True) as session:
            self._job(session, job_id)
            now, silence = self._now(session), timedelta(seconds=stale_after)
            lives = JobRow.updated_at.between(now - silence, now + silence)  # `records.alive`, in SQL
            free = update(JobRow).where(JobRow.id == job_id, ~(_HELD & lives))
            taken = session.execute(
                free.values(
                    status="running", error=None, updated_at=now, finished_at=None, attempt=JobRow.attempt + 1
                ).execution_options(synchronize_session=False)
            )
            assert isinstance(taken, CursorResult)
            if not taken.rowcount:
                return False
            attempt = session.scalars(select(JobRow.attempt).where(JobRow.id == job_id)).one()
        self._attempts[job_id] = attempt
        return True

    def cancel(self, job_id: int, *, stale_after: float) -> Job:
        """Cancel a job: its process, if one holds it (see `claim`), learns so from its next heartbeat.

        LamtuneError if the job is over already, NotInStore if there is none with that id.
        """
        with self._session(write=True) as session:
            now = self._now(session)
            row = self._job(session, job_id)
            if row.finished_at is not None:
                raise LamtuneError(f"job {job_id} is {row.status} already")
            held = row.status in ("running", "cancelled") and alive(row.updated_at, now, stale_after)
            row.status, row.error = "cancelled", "cancelled on request"
            row.finished_at = None if held else now
            session.flush()
            return row.record()

    def heartbeat(self, job_id: int) -> JobStatus:
        """Record a sign of life; return the status, which another process may have set to cancelled."""
        with self._session(write=True) as session:
            row = self._own_job(session, job_id)
            row.updated_at = self._now(session)
            session.flush()
            return row.record().status

    def note_warm_start(self, job_id: int, warm_start: Mapping[str, Any]) -> None:
        """Record where the search of a job is about to begin; see `Job.warm_start`."""
        with self._session(write=True) as session:
            self._own_job(session, job_id).warm_start = dict(warm_start)

    # ---- evaluations

    def start_evaluation(
        self,
        job_id: int,
        number: int,
        phase: str,
        schedule: Schedule,
        *,
        seed: int | None = None,
        parameters: Mapping[str, float] | None = None,
        key: str = "",
        reused: int | None = None,
    ) -> Evaluation:
        """Add a running evaluation of `schedule`; `number` is Optuna's trial number, new in the job.

        `phase`: what the strategy calls this part of the search (baseline, coarse, fine, k, …), or `CONFIRM`. `seed`:
        of its random numbers, default the job's. The others: see `Evaluation`.
        """
        with self._session(write=True) as session:
            now = self._now(session)
            job = self._own_job(session, job_id)
            assert schedule.nfe == job.nfe, (schedule.nfe, job.nfe)
            job.updated_at = now
            row = EvaluationRow(
                job_id=job_id,
                number=number,
                phase=phase,
                k=schedule.k,
                b=schedule.b,
                mean=schedule.mean,
                lambdas=list(schedule.lambdas),
                state="running",
                images=0,
                rungs={},
                network_evaluations=0,
                seconds=0.0,
                started_at=now,
                parameters=dict(parameters or {}),
                seed=job.seed if seed is None else seed,
                influence=b"",
                metrics={},
                key=key,
                reused=reused,
            )
            session.add(row)
            session.flush()
            return row.record()

    @contextmanager
    def _running(self, evaluation_id: int) -> Iterator[EvaluationRow]:
        """A running evaluation to change; LamtuneError if it is over, NotInStore if it is not there."""
        with self._session(write=True) as session:
            row = session.get(EvaluationRow, evaluation_id, with_for_update=True)
            if row is None:
                raise NotInStore(f"the store {self.safe_url} has no evaluation {evaluation_id}")
            if row.state != "running":
                raise LamtuneError(
                    f"evaluation {row.number} of job {row.job_id} is {row.state} and cannot change any more"
                )
            yield row
            self._sign_of_life(session, row.job_id)
            session.flush()

    def report_rung(
        self,
        evaluation_id: int,
        *,
        images: int,
        distance: float,
        network_evaluations: int,
        seconds: float,
        standard_error: float | None = None,
        gain: float | None = None,
        gain_error: float | None = None,
        influence: bytes = b"",
        metrics: Mapping[str, float] | None = None,
    ) -> Evaluation:
        """Record the distance at `images` images, its error bars, and what the evaluation has cost in all so far.

        Image counts and costs only grow. LamtuneError for a distance that is not finite: fail the evaluation.
        """
        if not math.isfinite(distance):
            raise LamtuneError(
                f"the distance at {images} images is {distance}: such an evaluation has failed"
            )
        with self._running(evaluation_id) as row:
            if images <= row.images:
                raise LamtuneError(
                    f"evaluation {row.number} of job {row.job_id} is past {images} images, at {row.images}"
                )
            assert network_evaluations >= row.network_evaluations
            assert seconds >= row.seconds
            row.images, row.distance = images, distance
            row.rungs = {**row.rungs, str(images): distance}
            row.network_evaluations, row.seconds = network_evaluations, seconds
            row.standard_error, row.gain, row.gain_error = standard_error, gain, gain_error
            row.influence, row.metrics = influence, dict(metrics or {})
        return row.record()

    def finish_evaluation(self, evaluation_id: int, *, pruned: bool = False) -> Evaluation:
        """Close an evaluation at its last rung: complete, or pruned. LamtuneError if it has no rung."""
        with self._running(evaluation_id) as row:
            if row.distance is None and not pruned:
                raise LamtuneError(
                    f"evaluation {row.number} of job {row.job_id} has no distance to finish with"
                )
            self._end(row, "pruned" if pruned else "complete")
        return row.record()

    def fail_evaluation(self, evaluation_id: int, error: str) -> Evaluation:
        """Close an evaluation that went wrong, with the error's text for people; its rungs and costs stay."""
        with self._running(evaluation_id) as row:
            row.error = error
            self._end(row, "failed")
        return row.record()

    def _end(self, row: EvaluationRow, state: EvaluationState) -> None:
        """Close an evaluation."""
        session = Session.object_session(row)
        assert session is not None, "made in one"
        row.state, row.finished_at = state, self._now(session)

    def evaluations(
        self, job_id: int, limit: int | None = None, after_number: int | None = None
    ) -> tuple[Evaluation, ...]:
        """A job's evaluations by ascending number, all of them or at most `limit`; NotInStore if there is no such job.

        For the next page give the last one's number as `after_number`.
        """
        query = select(EvaluationRow).where(EvaluationRow.job_id == job_id).order_by(EvaluationRow.number)
        if after_number is not None:
            query = query.where(EvaluationRow.number > after_number)
        with self._session() as session:
            self._job(session, job_id)
            return tuple(row.record() for row in session.scalars(query.limit(limit)))

    def known(self, key: str, images: int) -> Evaluation | None:
        """An evaluation of any job that has measured what `key` names, on so many images or more; None: there is none.

        A lower rung of a longer evaluation will do, since rungs count the same images from the first.
        """
        query = (
            select(EvaluationRow)
            .where(
                EvaluationRow.key == key,
                EvaluationRow.state.in_(("complete", "pruned")),
                EvaluationRow.images >= images,
            )
            .order_by(EvaluationRow.images, EvaluationRow.id)
        )
        with self._session() as session:
            return next(
                (row.record() for row in session.scalars(query) if str(images) in row.rungs),
                None,
            )

    # ---- pictures

    def add_picture(self, evaluation_id: int, picture_id: str, content: bytes) -> None:
        """Keep a PNG of what a running evaluation made; `picture_id` is new in the store."""
        with self._running(evaluation_id) as row:
            session = Session.object_session(row)
            assert session is not None
            session.add(PictureRow(id=picture_id, evaluation_id=evaluation_id, content=content))

    def picture(self, picture_id: str) -> bytes:
        """A picture by its id; NotInStore."""
        with self._session() as session:
            row = session.get(PictureRow, picture_id)
            if row is None:
                raise NotInStore(f"the store {self.safe_url} has no picture {picture_id}")
            return row.content

    def pictures(self, job_id: int) -> Mapping[int, bytes]:
        """The newest picture of each evaluation of a job that has one, by the evaluation's id."""
        query = (
            select(PictureRow)
            .join(EvaluationRow, PictureRow.evaluation_id == EvaluationRow.id)
            .where(EvaluationRow.job_id == job_id)
        )
        with self._session() as session:
            return {row.evaluation_id: row.content for row in session.scalars(query)}

    # ---- diagnoses

    def add_diagnosis(
        self,
        content: Mapping[str, Any],
        *,
        model: str,
        model_fingerprint: str,
        dataset: str,
        sampling: Mapping[str, Any],
    ) -> Job | None:
        """Keep what was measured of a network (plain data) with its newest job, which is returned.

        sampling: all options of the solver; of any precision. None: there is no such job, and nothing is kept.
        """
        query = (
            select(JobRow)
            .where(
                JobRow.model == model,
                JobRow.model_fingerprint == model_fingerprint,
                JobRow.dataset == dataset,
            )
            .order_by(JobRow.id.desc())
        )
        with self._session(write=True) as session:
            for row in session.scalars(query):
                if {**row.sampling, "precision": None} == {**sampling, "precision": None}:
                    session.add(DiagnosisRow(job_id=row.id, content=dict(content)))
                    return row.record()
        return None

    def diagnosis(self, job_id: int) -> Mapping[str, Any] | None:
        """The newest diagnosis that was kept with a job."""
        query = select(DiagnosisRow).where(DiagnosisRow.job_id == job_id).order_by(DiagnosisRow.id.desc())
        with self._session() as session:
            row = session.scalars(query.limit(1)).first()
            return None if row is None else row.content

    # ---- the best schedule

    def best(self, model: str, dataset: str, nfe: int, solver: str | None = None) -> Best:
        """The schedule of the lowest distance for a (model, dataset, NFE) and, if given, a solver.

        Evaluations on fresh random numbers rank (phase `CONFIRM`, at their full image count); only where there is
        none of them do the search's own complete ones. They rank among jobs of one group: the same evaluator, image
        count, seed and model weights. The group of the newest job with a ranking evaluation wins. Of equal distances
        the first evaluated wins, so λ = 1, which comes first, gives way only to a gain. NotInStore if nothing ranks;
        the message lists what does.
        """
        asked = [JobRow.model == model, JobRow.dataset == dataset, JobRow.nfe == nfe]
        if solver is not None:
            asked.append(JobRow.solver == solver)
        with self._session() as session:
            for confirmed in (True, False):
                newest_first = _ranking(select(JobRow), confirmed, *asked).order_by(JobRow.id.desc())
                newest = session.scalars(newest_first.limit(1)).first()
                if newest is not None:
                    break
            if newest is None:
                raise NotInStore(self._nearest(session, model, dataset, nfe, solver))
            group = [
                JobRow.evaluator_id == newest.evaluator_id,
                JobRow.seed == newest.seed,
                JobRow.model_fingerprint == newest.model_fingerprint,
                JobRow.confirm == newest.confirm if confirmed else JobRow.images == newest.images,
            ]
            ranked = _ranking(select(EvaluationRow, JobRow), confirmed, *asked, *group)
            ranked = ranked.order_by(EvaluationRow.distance, EvaluationRow.id).limit(1)
            winner, job = (row.record() for row in session.execute(ranked).one())
            return self._as_best(session, job, winner, confirmed)

    def best_of(self, job_id: int) -> Best:
        """The schedule of the lowest distance in one job, by the rules of `best`; NotInStore if nothing ranks yet."""
        with self._session() as session:
            job = self._job(session, job_id).record()
            for confirmed in (True, False):
                ranked = _ranking(select(EvaluationRow, JobRow), confirmed, JobRow.id == job_id)
                ranked = ranked.order_by(EvaluationRow.distance, EvaluationRow.id).limit(1)
                if (found := session.execute(ranked).first()) is not None:
                    return self._as_best(session, job, found[0].record(), confirmed)
        raise NotInStore(f"job {job_id} in the store {self.safe_url} has no result yet: it is {job.status}")

    def _as_best(self, session: Session, job: Job, winner: Evaluation, confirmed: bool) -> Best:
        """The winning evaluation of a job with what finding it took."""
        assert winner.distance is not None
        baseline, cost = self._baseline(session, winner), self._cost(session, job.id)
        searched, confirming = cost[False], cost[True]
        return Best(
            model=job.model,
            model_fingerprint=job.model_fingerprint,
            dataset=job.dataset,
            solver=job.solver,
            sampling=job.sampling,
            nfe=job.nfe,
            k=winner.k,
            b=winner.b,
            lambdas=winner.lambdas,
            parameters=winner.parameters,
            distance=winner.distance,
            standard_error=winner.standard_error,
            baseline_distance=None if baseline is None else baseline.distance,
            gain=winner.gain,
            gain_error=winner.gain_error,
            significant=None
            if winner.gain is None or winner.gain_error is None
            else winner.gain > 2 * winner.gain_error,
            confirmed=confirmed,
            images=winner.images,
            seed=winner.seed,
            metrics=winner.metrics,
            objective=job.evaluator.objective,
            evaluator=job.evaluator.fingerprint,
            job_id=job.id,
            number=winner.number,
            status=job.status,
            strategy=job.strategy,
            trials=searched.trials,
            network_evaluations=searched.network_evaluations,
            seconds=searched.seconds,
            confirm_network_evaluations=confirming.network_evaluations,
            confirm_seconds=confirming.seconds,
        )

    @staticmethod
    def _baseline(session: Session, winner: Evaluation) -> Evaluation | None:
        """λ = 1 in the winner's job, complete, on the same random numbers and as many images."""
        query = (
            select(EvaluationRow)
            .where(
                EvaluationRow.job_id == winner.job_id,
                EvaluationRow.state == "complete",
                EvaluationRow.seed == winner.seed,
                EvaluationRow.images == winner.images,
                EvaluationRow.mean.between(1 - 1e-12, 1 + 1e-12),  # what SQL can say of λ_t = 1 for all t
                or_(EvaluationRow.k == 0, EvaluationRow.k.is_(None)),
            )
            .order_by(EvaluationRow.number)
        )
        found = (row.record() for row in session.scalars(query))
        return next((one for one in found if one.is_baseline), None)

    @staticmethod
    def _cost(session: Session, job_id: int) -> dict[bool, _Cost]:
        """What a job's search (False) and its confirmation (True) have cost."""
        confirming = EvaluationRow.phase == CONFIRM
        sums = (
            select(
                confirming,
                func.count(),
                func.sum(EvaluationRow.network_evaluations),
                func.sum(EvaluationRow.seconds),
            )
            .where(EvaluationRow.job_id == job_id)
            .group_by(confirming)
        )
        found = {
            bool(of): _Cost(trials, int(calls), seconds)
            for of, trials, calls, seconds in session.execute(sums)
        }
        return {False: _Cost(), True: _Cost()} | found

    def _nearest(self, session: Session, model: str, dataset: str, nfe: int, solver: str | None) -> str:
        """The message of NotInStore: what was asked, and the combinations most like it that have a result."""
        wanted = f"model {model}, dataset {dataset}" + (f", solver {solver}" if solver else "")
        found: dict[str, list[int]] = {}
        columns = (JobRow.model, JobRow.dataset, JobRow.solver, JobRow.nfe)
        known = select(*columns).where(or_(_ranks(True), _ranks(False)), EvaluationRow.job_id == JobRow.id)
        known = known.distinct().order_by(*columns)
        for name, data, by, steps in session.execute(known):
            found.setdefault(f"model {name}, dataset {data}, solver {by}", []).append(steps)
        message = f"the store {self.safe_url} has no result for {wanted}, NFE {nfe}"
        if not found:
            return f"{message}, nor for any other: `lamtune submit` a job"
        nearest = sorted(found, key=lambda name: -SequenceMatcher(None, wanted, name).ratio())
        lines = [f"  {name}, NFE {', '.join(map(str, found[name]))}" for name in nearest[:_NEAREST]]
        more = [f"  and {len(nearest) - _NEAREST} more"] if len(nearest) > _NEAREST else []
        return "\n".join([f"{message}; it has", *lines, *more])

    # ---- Optuna

    def optuna_storage(self) -> "RDBStorage":
        """The Optuna storage on this database, its tables made if need be; ours are not touched.

        One for all who ask, so that many jobs leave a server's connections to others. InputError where another version
        of Optuna made its tables; LamtuneError where the database fails.
        """
        with self._making_optuna:
            if self._optuna is None:
                self._optuna = self._new_optuna_storage()
            return self._optuna

    def _new_optuna_storage(self) -> "RDBStorage":
        from optuna.exceptions import StorageInternalError  # heavy, and only a search needs it
        from optuna.storages import RDBStorage

        # Optuna fills {templates} in its URL; braces of ours are percent-encoded here.
        url = self._url.render_as_string(hide_password=False)
        failure: Exception = LamtuneError("never tried")
        for _ in range(20):
            try:
                storage = RDBStorage(url, engine_kwargs=driver_options(self._url))
                wait_for(storage.engine, self._patience)
                return storage
            except (SQLAlchemyError, StorageInternalError) as error:
                # Optuna takes no lock while it makes its tables: of several processes that start together
                # on an empty database the slower ones fail, and succeed once the tables stand.
                failure = error
                time.sleep(0.1)
            except RuntimeError as error:  # Optuna's word for tables of another version
                failure = InputError(f"the store {self.safe_url}: {redacted(self._url, error)}")
                break
        if isinstance(failure, InputError):
            raise failure
        raise LamtuneError(f"the store {self.safe_url} failed: {redacted(self._url, failure)}")


def _asked_to_end(error: BaseException | None, handled: BaseException | None) -> BaseException | None:
    """The Ctrl-C or exit amid which an error arose; not that one which was being handled already."""
    while error is not None and error is not handled:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        error = error.__cause__ or error.__context__
    return None


def _ranks(confirmed: bool) -> ColumnElement[bool]:
    """What ranks: complete evaluations at the full image count, of the confirmation or of the search itself."""
    if confirmed:
        full = and_(EvaluationRow.phase == CONFIRM, EvaluationRow.images == JobRow.confirm)
    else:
        full = and_(EvaluationRow.phase != CONFIRM, EvaluationRow.images == JobRow.images)
    return and_(EvaluationRow.state == "complete", full)


def _ranking(query: _S, confirmed: bool, *conditions: ColumnElement[bool]) -> _S:
    """`query` over jobs with those of their evaluations that rank and meet the conditions."""
    return query.where(EvaluationRow.job_id == JobRow.id, _ranks(confirmed), *conditions)
