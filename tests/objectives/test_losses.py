"""objectives.losses: the metrics, their images left out one by one, and the error bars that follow."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from objectives import losses, metrics
from objectives.losses import LOSSES, measure
from objectives.metrics import METRICS, Generated, Real
from objectives.paired import block_means, difference_error, standard_error
from samplers.errors import InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = list(LOSSES)
EXACT = [name for name, loss in LOSSES.items() if loss.error_bars]


def images(count: int, seed: int, shift: float = 0.0, dim: int = 3) -> Generated:
    numbers = torch.Generator().manual_seed(seed)
    return seen(torch.randn(count, dim, generator=numbers, dtype=torch.float64) + shift)


def seen(features: Tensor) -> Generated:
    """With the logits of a classifier of 5 classes."""
    head = torch.randn(features.shape[1], 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Generated(features, features @ head)


def without(generated: Generated, i: int) -> Generated:
    keep = torch.arange(len(generated.features)) != i
    assert generated.logits is not None
    return Generated(generated.features[keep], generated.logits[keep])


@pytest.fixture(scope="module")
def real() -> Real:
    return Real.of(images(150, 1).features)


def test_there_is_a_loss_for_every_metric() -> None:
    assert list(LOSSES) == list(METRICS)


def test_a_loss_is_its_metric_turned_so_that_less_is_better(real: Real) -> None:
    for shift in (0.0, 0.5):
        mine = images(150, 2, shift)  # as many as real ones: each subset of KID is all of them
        found = metrics.measure(["kid", "precision", "recall"], mine, real)
        assert measure("kid", mine, real)[0] == pytest.approx(found["kid"], rel=1e-9)
        assert measure("precision", mine, real)[0] == pytest.approx(1 - found["precision"])
        assert measure("recall", mine, real)[0] == pytest.approx(1 - found["recall"])
        score = isc_features_to_metric(mine.logits, 1)["inception_score_mean"]
        assert measure("inception_score", mine, None)[0] == pytest.approx(1 / score, rel=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_an_influence_is_the_loss_with_the_image_less_the_loss_without_it(name: str, real: Real) -> None:
    for n, shift in ((40, 0.0), (90, 1.0)):
        mine = images(n, 3, shift)
        loss, found = measure(name, mine, real)
        assert found is not None
        left_out = torch.tensor([measure(name, without(mine, i), real)[0] for i in range(n)])
        jackknife = (n - 1) * (loss - left_out.double())
        wanted = jackknife - jackknife.mean()
        assert float(found.abs().max()) > 0
        # The Inception score is to first order in 1/n.
        assert torch.allclose(found, wanted, rtol=0.1, atol=0.02 if name == "inception_score" else 1e-9)


def test_classes_that_no_image_is_of_add_nothing_to_the_inception_score() -> None:
    mine = images(30, 5)
    assert mine.logits is not None
    impossible = torch.full((30, 2), -2000.0, dtype=torch.float64)
    more = Generated(mine.features, torch.cat([mine.logits, impossible], 1))
    assert measure("inception_score", more, None)[0] == pytest.approx(
        measure("inception_score", mine, None)[0]
    )


def test_parts_that_do_not_divide_the_images_change_nothing(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = images(80, 4, 0.3)
    whole = {name: measure(name, mine, real) for name in NAMES}
    monkeypatch.setattr(metrics, "_PAIRS", 1000)
    for name in NAMES:
        loss, found = measure(name, mine, real)
        before, wanted = whole[name]
        assert loss == pytest.approx(before, rel=1e-9)
        assert (found is None) == (wanted is None) == (name == "recall")
        if found is not None and wanted is not None:
            assert torch.allclose(found, wanted, atol=1e-9)
    assert Real.of(real.features).within == pytest.approx(real.within, rel=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_error_bars_are_the_spread_of_repeated_losses_and_of_their_differences(name: str, real: Real) -> None:
    numbers = torch.Generator().manual_seed(6)
    found, errors, paired = [], [], []
    for _ in range(300):
        noise = torch.randn(100, 3, generator=numbers, dtype=torch.float64)
        pair = [measure(name, seen(scale * noise + 0.4), real) for scale in (1.1, 1.2)]
        blocks = [block_means(influences.numpy()) for _, influences in pair if influences is not None]
        found.append([loss for loss, _ in pair])
        errors.append(standard_error(blocks[0]))
        paired.append(difference_error(*blocks))
    one, other = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(one), rel=0.15)  # 300 know a spread to 4 %
    assert np.mean(paired) == pytest.approx(np.std(one - other), rel=0.15)
    assert np.mean(paired) < 0.7 * np.mean(errors)


@pytest.mark.parametrize(("name", "count"), [("kid", 2), ("recall", 3)])
def test_too_few_images_are_refused(name: str, count: int, real: Real) -> None:
    with pytest.raises(InputError, match=f"not {count}: ask for more images"):
        measure(name, images(count, 1), real)


def test_a_loss_that_is_not_finite_is_an_error(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = losses.Loss("KID", lambda generated, _: (math.nan, torch.zeros(len(generated.features))))
    monkeypatch.setattr(losses, "LOSSES", {"kid": broken})
    with pytest.raises(NonFiniteError, match="KID is nan"):
        measure("kid", images(10, 1), real)
