"""The first tables: evaluators, jobs, evaluations. Knows nothing of `storage.tables`, which moves on."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "lamtune_evaluators",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("features", sa.String, nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.Column("reference", sa.String, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lamtune_evaluators"),
        sa.UniqueConstraint("fingerprint", name="uq_lamtune_evaluators_fingerprint"),
    )
    op.create_table(
        "lamtune_jobs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_name", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("model_fingerprint", sa.String, nullable=False),
        sa.Column("dataset", sa.String, nullable=False),
        sa.Column("solver", sa.String, nullable=False),
        sa.Column("sampling", sa.JSON, nullable=False),
        sa.Column("nfe", sa.Integer, nullable=False),
        sa.Column("strategy", sa.String, nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("evaluator_id", sa.Integer, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("error", sa.String),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_lamtune_jobs"),
        sa.UniqueConstraint("study_name", name="uq_lamtune_jobs_study_name"),
        sa.ForeignKeyConstraint(
            ["evaluator_id"], ["lamtune_evaluators.id"], name="fk_lamtune_jobs_evaluator_id"
        ),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'finished', 'failed', 'cancelled')",
            name="ck_lamtune_jobs_status",
        ),
    )
    op.create_index("ix_lamtune_jobs_model_dataset_nfe", "lamtune_jobs", ["model", "dataset", "nfe"])
    op.create_index("ix_lamtune_jobs_status", "lamtune_jobs", ["status"])
    op.create_table(
        "lamtune_evaluations",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("job_id", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("k", sa.Double),
        sa.Column("b", sa.Double),
        sa.Column("mean", sa.Double, nullable=False),
        sa.Column("lambdas", sa.JSON, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("distance", sa.Double),
        sa.Column("rungs", sa.JSON, nullable=False),
        sa.Column("network_evaluations", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("error", sa.String),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_lamtune_evaluations"),
        sa.UniqueConstraint("job_id", "number", name="uq_lamtune_evaluations_job_id_number"),
        sa.ForeignKeyConstraint(["job_id"], ["lamtune_jobs.id"], name="fk_lamtune_evaluations_job_id"),
        sa.CheckConstraint(
            "state IN ('running', 'complete', 'failed', 'pruned')", name="ck_lamtune_evaluations_state"
        ),
        sa.CheckConstraint(
            "state <> 'complete' OR (distance IS NOT NULL AND distance > -1e308 AND distance < 1e308)",
            name="ck_lamtune_evaluations_finite",
        ),
    )
