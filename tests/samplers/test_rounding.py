"""samplers.rounding: what is asked for holds meanwhile, and nothing else changes."""

from typing import Any

import pytest
import torch

from samplers.rounding import Rounding, float32


def settings() -> tuple[str, str]:
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("convolutions", [None, "ieee", "tf32"])
@pytest.mark.parametrize("products", [None, "ieee", "tf32"])
def test_what_is_asked_for_holds_meanwhile_and_the_callers_settings_come_back(
    convolutions: Rounding | None, products: Rounding | None
) -> None:
    before, seen = settings(), []

    def fail() -> None:
        with float32(convolutions=convolutions, products=products):
            seen.append(settings())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [(convolutions or before[0], products or before[1])]
    assert settings() == before
