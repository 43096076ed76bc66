"""Turns images into a number: features, streamed moments, the Fréchet distance, reference statistics.

Knows nothing of schedules, solvers, trials or databases.
"""
