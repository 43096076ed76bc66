"""Adapter `digits`: the small ADM network of 8×8 grey handwritten digits that lamtune brings along.

Knows nothing of how it was trained. It lets the tests, the demo and a new user run without any download.
"""

from collections.abc import Mapping
from pathlib import Path

from samplers.errors import InputError
from samplers.models.adm import AdmModel, load_adm

WEIGHTS = Path(__file__).with_name("digits.pt")

FLAGS: Mapping[str, object] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "4",
    "num_head_channels": 32,
    "use_new_attention_order": True,
    "noise_schedule": "cosine",
    "sigma_small": True,
}
"""The flags that `digits.pt` was trained with."""


def load_digits(options: Mapping[str, object]) -> AdmModel:
    """The bundled network, on the CPU. It has no options: InputError if some are given."""
    if options:
        raise InputError(
            f"model.options: format 'digits' has no option {next(iter(options))!r}; leave them out"
        )
    return load_adm(WEIGHTS, FLAGS)
