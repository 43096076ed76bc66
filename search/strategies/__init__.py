"""Decides which schedule to try next; pure functions of the history, one module per strategy."""
