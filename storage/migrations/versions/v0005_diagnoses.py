"""Diagnoses of the networks of jobs.

Knows nothing of `storage.tables`, which moves on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "lamtune_diagnoses",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("job_id", sa.Integer, nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lamtune_diagnoses"),
        sa.ForeignKeyConstraint(["job_id"], ["lamtune_jobs.id"], name="fk_lamtune_diagnoses_job_id"),
    )
    op.create_index("ix_lamtune_diagnoses_job_id", "lamtune_diagnoses", ["job_id"])
