"""objectives.states: δ_t against closed forms, in any batches and in both forms."""

import math

import pytest
import torch
from torch import Tensor

from objectives import states
from objectives.moments import Moments
from objectives.states import ForwardProcess, StateSums, Variances, deltas, form
from samplers.errors import NonFiniteError


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(count: int, dim: int, seed: int) -> Tensor:
    """Points with mean 0 and covariance I to rounding."""
    x = normal(count, dim, seed)
    x = x - x.mean(0)
    return torch.linalg.qr(x)[0] * math.sqrt(count - 1)


@pytest.mark.parametrize("kind", [Moments, Variances])
def test_scaled_and_shifted_states_are_at_the_distance_of_their_gaussians(
    kind: type[Moments | Variances],
) -> None:
    alpha, sigma, std, mean, dim = 0.6, 0.8, 0.5, 0.3, 6
    forward = ForwardProcess(kind.of(mean + std * exact(400, dim, 1)))
    there = math.sqrt(alpha**2 * std**2 + sigma**2)
    for shift, scale in ((0.0, there), (0.2, there), (0.0, 1.3), (0.1, 0.4)):
        got = forward.distance(alpha, sigma, kind.of(alpha * mean + shift + scale * exact(300, dim, 2)))
        assert got == pytest.approx(dim * (shift**2 + (scale - there) ** 2), abs=1e-9)


def test_the_full_form_sees_how_values_vary_together_and_the_diagonal_one_does_not() -> None:
    x0 = exact(500, 3, 1)
    mix = torch.tensor(
        [[1.0, 0.9, 0.0], [0.0, math.sqrt(1 - 0.81), 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    turned = exact(500, 3, 2) @ mix  # variances 1 as before, but two values go together
    full = ForwardProcess(Moments.of(x0)).distance(1.0, 0.0, Moments.of(turned))
    diagonal = ForwardProcess(Variances.of(x0)).distance(1.0, 0.0, Variances.of(turned))
    # two values of correlation r: 4 - 2(sqrt(1 + r) + sqrt(1 - r))
    assert full == pytest.approx(4 - 2 * (math.sqrt(1.9) + math.sqrt(0.1)), abs=1e-9)
    assert diagonal == pytest.approx(0, abs=1e-9)


def test_a_correlated_forward_process_is_at_no_distance_from_its_own_moments() -> None:
    root = normal(5, 5, 3)
    forward = ForwardProcess(Moments.of(exact(500, 5, 1) @ root))
    x = 0.7 * exact(400, 5, 2) @ root  # covariance alpha²·Σ without noise
    assert forward.distance(0.7, 0.0, Moments.of(x)) == pytest.approx(0, abs=1e-6)
    assert forward.distance(0.9, 0.0, Moments.of(x)) > 0.01


def test_the_distance_of_a_sample_falls_to_zero_as_documented() -> None:
    dim, count = 40, 2000
    forward = ForwardProcess(Moments.of(0.0 * normal(10, dim, 1)))  # all data is one point
    got = forward.distance(1.0, 2.0, Moments.of(2 * normal(count, dim, 2)))
    assert got == pytest.approx(4 * (dim**2 / (4 * count) + dim / count), rel=0.15)


def test_states_add_up_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(50, 12, 1).reshape(50, 3, 2, 2)
    forward = {"full": ForwardProcess(Moments.of(normal(90, 12, 2)))}
    forward["diagonal"] = ForwardProcess(Variances.of(normal(90, 12, 2)))
    for most, kind in ((4096, "full"), (11, "diagonal")):
        monkeypatch.setattr(states, "_FULL_UP_TO", most)
        assert form(12) == kind
        whole, parts = StateSums(2, 12), StateSums(2, 12)
        for t in (0, 1):
            whole.add(t, (t + 1) * x)
            for part in torch.split((t + 1) * x, 7):
                parts.add(t, part)
        levels = [(1.0, 0.1), (1.0, 2.0)]
        got = deltas(forward[kind], levels, parts)
        assert got == pytest.approx(deltas(forward[kind], levels, whole), rel=1e-9)
        assert got[0] != got[1]


def test_states_that_are_not_finite_are_refused() -> None:
    bad = normal(20, 3, 1)
    bad[2, 1] = float("nan")
    for kind in (Moments, Variances):
        with pytest.raises(NonFiniteError):
            ForwardProcess(kind.of(normal(20, 3, 2))).distance(1.0, 1.0, kind.of(bad))
