"""Decides what to try and runs it: job files, strategies, the Ray and Optuna layers, reports and the command line."""
