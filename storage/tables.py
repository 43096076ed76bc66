"""The tables `lamtune_*` as SQLAlchemy classes; `migrations/` makes them.

Knows nothing of connections or queries.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from storage.records import Evaluation, EvaluationState, Evaluator, Job, JobStatus


class Utc(TypeDecorator[datetime]):
    """An aware time in UTC; SQLite keeps no zone and PostgreSQL answers in the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Any aware time → UTC."""
        if value is None:
            return None
        assert value.tzinfo is not None
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """What the database gave → aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The root of lamtune's own tables; Optuna's belong to another one."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: Utc, float: Double, Mapping[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own


class EvaluatorRow(Base):
    """See `records.Evaluator`."""

    __tablename__ = "lamtune_evaluators"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(unique=True)
    features: Mapped[str]
    dimension: Mapped[int]
    reference: Mapped[str]
    details: Mapped[Mapping[str, Any]]

    def record(self) -> Evaluator:
        """This row as a value."""
        return Evaluator(
            fingerprint=self.fingerprint,
            features=self.features,
            dimension=self.dimension,
            reference=self.reference,
            details=self.details,
        )


class JobRow(Base):
    """See `records.Job`."""

    __tablename__ = "lamtune_jobs"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'finished', 'failed', 'cancelled')", name="status"),
        Index(None, "model", "dataset", "nfe"),
        Index(None, "status"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    study_name: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str]
    model_fingerprint: Mapped[str]
    dataset: Mapped[str]
    solver: Mapped[str]
    sampling: Mapped[Mapping[str, Any]]
    nfe: Mapped[int]
    strategy: Mapped[str]
    images: Mapped[int]
    seed: Mapped[int] = mapped_column(BigInteger)
    spec: Mapped[Mapping[str, Any]]
    evaluator_id: Mapped[int] = mapped_column(ForeignKey("lamtune_evaluators.id"))
    confirm: Mapped[int] = mapped_column(server_default="0")
    warm_start: Mapped[Mapping[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    versions: Mapped[Mapping[str, Any]] = mapped_column(server_default="{}")
    status: Mapped[str]
    attempt: Mapped[int] = mapped_column(
        server_default="0"
    )  # how often it was claimed; the last one may write
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]

    evaluator: Mapped[EvaluatorRow] = relationship(lazy="joined", innerjoin=True)

    def record(self) -> Job:
        """This row as a value."""
        return Job(
            id=self.id,
            study_name=self.study_name,
            model=self.model,
            model_fingerprint=self.model_fingerprint,
            dataset=self.dataset,
            solver=self.solver,
            sampling=self.sampling,
            nfe=self.nfe,
            strategy=self.strategy,
            images=self.images,
            seed=self.seed,
            spec=self.spec,
            evaluator=self.evaluator.record(),
            confirm=self.confirm,
            warm_start=self.warm_start,
            versions=self.versions,
            status=cast(JobStatus, self.status),
            error=self.error,
            created_at=self.created_at,
            updated_at=self.updated_at,
            finished_at=self.finished_at,
        )


class EvaluationRow(Base):
    """See `records.Evaluation`; in JSON the keys of `rungs` are text."""

    __tablename__ = "lamtune_evaluations"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        CheckConstraint("state IN ('running', 'complete', 'failed', 'pruned')", name="state"),
        # PostgreSQL sorts NaN above every number, so the upper bound refuses it as well as infinity.
        CheckConstraint(
            "state <> 'complete' OR (distance IS NOT NULL AND distance > -1e308 AND distance < 1e308)",
            name="finite",
        ),
        Index(None, "key"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("lamtune_jobs.id"))
    number: Mapped[int]
    phase: Mapped[str]
    k: Mapped[float | None]
    b: Mapped[float | None]
    mean: Mapped[float]
    lambdas: Mapped[list[float]] = mapped_column(JSON)
    state: Mapped[str]
    images: Mapped[int]
    distance: Mapped[float | None]
    rungs: Mapped[dict[str, float]] = mapped_column(JSON)
    network_evaluations: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    error: Mapped[str | None]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    parameters: Mapped[Mapping[str, Any]] = mapped_column(server_default="{}")
    seed: Mapped[int] = mapped_column(BigInteger)
    standard_error: Mapped[float | None]
    gain: Mapped[float | None]
    gain_error: Mapped[float | None]
    influence: Mapped[bytes] = mapped_column(LargeBinary, server_default="")
    metrics: Mapped[Mapping[str, Any]] = mapped_column(server_default="{}")
    key: Mapped[str] = mapped_column(server_default="")
    reused: Mapped[int | None]

    def record(self) -> Evaluation:
        """This row as a value."""
        return Evaluation(
            id=self.id,
            job_id=self.job_id,
            number=self.number,
            phase=self.phase,
            k=self.k,
            b=self.b,
            mean=self.mean,
            lambdas=tuple(self.lambdas),
            state=cast(EvaluationState, self.state),
            images=self.images,
            distance=self.distance,
            rungs={int(images): distance for images, distance in self.rungs.items()},
            network_evaluations=self.network_evaluations,
            seconds=self.seconds,
            error=self.error,
            started_at=self.started_at,
            finished_at=self.finished_at,
            parameters=self.parameters,
            seed=self.seed,
            standard_error=self.standard_error,
            gain=self.gain,
            gain_error=self.gain_error,
            influence=self.influence or b"",  # SQLite keeps the default as an empty text
            metrics=self.metrics,
            key=self.key,
            reused=self.reused,
        )


class PictureRow(Base):
    """A picture of what an evaluation made. id: of Optuna's artifact. content: a PNG."""

    __tablename__ = "lamtune_pictures"
    __table_args__ = (Index(None, "evaluation_id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    evaluation_id: Mapped[int] = mapped_column(ForeignKey("lamtune_evaluations.id"))
    content: Mapped[bytes] = mapped_column(LargeBinary)


class DiagnosisRow(Base):
    """What was measured of the network of a job beside its search. content: plain data."""

    __tablename__ = "lamtune_diagnoses"
    __table_args__ = (Index(None, "job_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("lamtune_jobs.id"))
    content: Mapped[Mapping[str, Any]]
