"""Diffusion sampling with an epsilon-scaling schedule: networks, grids, solvers and noise.

Knows nothing of distances, trials or databases.
"""
