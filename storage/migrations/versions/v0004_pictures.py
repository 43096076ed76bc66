"""Pictures of evaluations, and the versions of the programs that ran a job.

Knows nothing of `storage.tables`, which moves on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table and the column; jobs that stand already say nothing of versions."""
    with op.batch_alter_table("lamtune_jobs") as jobs:
        jobs.add_column(sa.Column("versions", sa.JSON, nullable=False, server_default="{}"))
    op.create_table(
        "lamtune_pictures",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("evaluation_id", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lamtune_pictures"),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["lamtune_evaluations.id"], name="fk_lamtune_pictures_evaluation_id"
        ),
    )
    op.create_index("ix_lamtune_pictures_evaluation_id", "lamtune_pictures", ["evaluation_id"])
