"""Jobs for benchmarks and tests: one that any machine runs at once, and one that a store takes without being run.

Knows nothing of what is measured with them.
"""

from typing import Any

from storage import Evaluator, NewJob

# An exact denoiser of 8×8 Gaussian noise: no weights, and the digits features measure it.
GAUSS: dict[str, Any] = {
    "model": {
        "name": "gauss",
        "format": "ideal",
        "options": {"time": "discrete", "shape": [1, 8, 8], "mean": 0.1, "std": 0.4},
    },
    "dataset": {"name": "digits", "reference": "digits"},
    "features": "digits",
}
"""The sections of a job file that say what is sampled and measured; `sampling` and `search` are the user's."""


def new_job(**changes: Any) -> NewJob:
    """A job for a store, with these fields in place of its own."""
    fields: dict[str, Any] = {
        "study_name": "s",
        "model": "m",
        "model_fingerprint": "w",
        "dataset": "d",
        "solver": "ddpm",
        "sampling": {},
        "nfe": 8,
        "strategy": "paper",
        "images": 1000,
        "seed": 0,
        "spec": {},
        "evaluator": Evaluator(fingerprint="e", features="f", dimension=64, reference="r", details={}),
    }
    return NewJob(**(fields | changes))
