"""Alembic's migrations of the tables `lamtune_*`.

To change a table: a new file in `versions/`, `upgrade.HEAD`, `tables.py`.
"""
