"""objectives.metrics: torch-fidelity's numbers, and closed forms."""

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from objectives import metrics
from objectives.features import load_extractor
from objectives.metrics import METRICS, Generated, Real, check, measure
from samplers.errors import InputError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["kid", "precision", "recall"]


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Not negative, as pooled ReLU features are."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=generator) + shift).relu()


@pytest.mark.parametrize(("count", "others", "shift"), [(1200, 1500, 0.0), (1500, 1100, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kid_is_torch_fidelitys(count: int, others: int, shift: float, dtype: torch.dtype) -> None:
    x, y = features(count, 24, 1, shift).to(dtype), features(others, 24, 2).to(dtype)
    wanted = kid_features_to_metric(x, y, verbose=False)[KEY_METRIC_KID_MEAN]
    assert measure(["kid"], Generated(x), Real.of(y))["kid"] == pytest.approx(wanted, abs=1e-6)


def test_kid_of_fewer_images_takes_subsets_of_all() -> None:
    x, y = features(200, 8, 1, 0.2), features(300, 8, 2)
    wanted = kid_features_to_metric(x, y, kid_subset_size=200, verbose=False)[KEY_METRIC_KID_MEAN]
    assert measure(["kid"], Generated(x), Real.of(y))["kid"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("count", "others", "shift"), [(700, 900, 0.0), (900, 700, 0.4)])
def test_precision_and_recall_are_torch_fidelitys(
    count: int, others: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = features(count, 6, 1, shift).double(), features(others, 6, 2).double()
    wanted = prc_features_to_metric(x, y, verbose=False)
    got = measure(["precision", "recall"], Generated(x), Real.of(y))
    assert got == pytest.approx({name: wanted[name] for name in got}, abs=1e-6)
    assert 0.1 < got["precision"] < 1
    assert 0.1 < got["recall"] < 1
    monkeypatch.setattr(metrics, "_PAIRS", 5000)  # in parts that do not divide the images
    assert measure(["precision", "recall"], Generated(x), Real.of(y)) == pytest.approx(got, abs=1e-12)


def test_precision_falls_for_images_off_the_data_and_recall_for_data_without_images() -> None:
    real = features(500, 4, 1)
    far = torch.cat([real[:250], real[:250] + 100])
    got = measure(["precision", "recall"], Generated(far), Real.of(real))
    assert got["precision"] == 0.5
    assert got["recall"] > 0.5
    one_place = real[:1] + 1e-3 * torch.rand(500, 4, generator=torch.Generator().manual_seed(3))
    got = measure(["precision", "recall"], Generated(one_place), Real.of(real))
    assert got["precision"] == 1
    assert got["recall"] < 0.02


def test_kid_of_the_same_distribution_is_zero_on_average_and_grows_with_the_shift() -> None:
    y = Real.of(features(2000, 16, 1).double())
    same, near, far = (
        measure(["kid"], Generated(features(2000, 16, 5, shift)), y)["kid"] for shift in (0.0, 0.1, 0.3)
    )
    assert abs(same) < 0.003
    assert same < near < far


def test_the_inception_score_is_torch_fidelitys_on_the_logits_of_the_features() -> None:
    extractor = load_extractor("digits", (1, 8, 8))
    images = torch.randint(
        0, 256, (130, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    x = extractor(images)
    logits = extractor.logits(x)
    assert logits is not None
    assert logits.shape == (130, 10)
    got = measure(["inception_score"], Generated(x, logits))
    assert got["inception_score"] == isc_features_to_metric(logits)["inception_score_mean"]
    assert measure(["inception_score"], Generated(x, 0 * logits)) == pytest.approx({"inception_score": 1.0})


def test_the_same_features_give_the_same_values_again() -> None:
    x, y = Generated(features(1100, 8, 1)), Real.of(features(1100, 8, 2))
    assert measure(NAMES, x, y) == measure(NAMES, x, y)
    assert list(measure(["recall", "kid"], x, y)) == ["recall", "kid"]


def test_names_and_what_they_need_are_checked_before_anything_runs() -> None:
    check("metrics", METRICS, real=True, logits=True)
    with pytest.raises(InputError, match="metrics: 'fid' is not known; there are kid, precision"):
        check("metrics", ["kid", "fid"], real=True, logits=True)
    with pytest.raises(InputError, match="metrics: recall needs the real images .* as dataset.images"):
        check("metrics", ["recall"], real=False, logits=True)
    with pytest.raises(InputError, match="metrics: inception_score needs features with class logits"):
        check("metrics", ["inception_score"], real=False, logits=False)


@pytest.mark.parametrize(("name", "count"), [("kid", 1), ("recall", 3), ("inception_score", 9)])
def test_too_few_images_are_refused(name: str, count: int) -> None:
    with pytest.raises(InputError, match=f"not {count}: ask for more images"):
        measure([name], Generated(features(count, 4, 1), features(count, 4, 1)), Real.of(features(50, 4, 2)))
    with pytest.raises(InputError, match="at least 4 images, not 3"):
        Real.of(features(3, 4, 1))


def test_features_that_are_not_finite_are_refused() -> None:
    bad = features(20, 4, 1)
    bad[3, 2] = float("nan")
    for make in (Generated, Real.of, lambda x: Generated(features(20, 4, 1), x)):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            make(bad)
