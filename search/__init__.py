"""Decides what to try and runs it: job files, strategies, the Ray and Optuna layers, the command line.

Knows nothing of networks and features beyond how to load them.
"""
