"""Error bars, confirmations on fresh random numbers, solver parameters and reuse.

Knows nothing of `storage.tables`, which moves on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns; evaluations that stand already ran on their job's seed."""
    with op.batch_alter_table("lamtune_jobs") as jobs:
        jobs.add_column(sa.Column("confirm", sa.Integer, nullable=False, server_default="0"))
        jobs.add_column(sa.Column("warm_start", sa.JSON))
    with op.batch_alter_table("lamtune_evaluations") as evaluations:
        evaluations.add_column(sa.Column("parameters", sa.JSON, nullable=False, server_default="{}"))
        evaluations.add_column(sa.Column("seed", sa.BigInteger))
        evaluations.add_column(sa.Column("standard_error", sa.Double))
        evaluations.add_column(sa.Column("gain", sa.Double))
        evaluations.add_column(sa.Column("gain_error", sa.Double))
        evaluations.add_column(sa.Column("influence", sa.LargeBinary, nullable=False, server_default=""))
        evaluations.add_column(sa.Column("metrics", sa.JSON, nullable=False, server_default="{}"))
        evaluations.add_column(sa.Column("key", sa.String, nullable=False, server_default=""))
        evaluations.add_column(sa.Column("reused", sa.Integer))
    op.execute(
        "UPDATE lamtune_evaluations SET seed = "
        "(SELECT seed FROM lamtune_jobs WHERE lamtune_jobs.id = lamtune_evaluations.job_id)"
    )
    with op.batch_alter_table("lamtune_evaluations") as evaluations:
        evaluations.alter_column("seed", nullable=False, existing_type=sa.BigInteger)
    op.create_index("ix_lamtune_evaluations_key", "lamtune_evaluations", ["key"])
