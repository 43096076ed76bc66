"""Which of the processes that ran a job is the one that may write to it.

Knows nothing of `storage.tables`, which moves on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; a process that runs a job with an older lamtune keeps it."""
    with op.batch_alter_table("lamtune_jobs") as jobs:
        jobs.add_column(sa.Column("attempt", sa.Integer, nullable=False, server_default="0"))
