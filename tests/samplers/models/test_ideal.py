"""The exact denoisers against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers.errors import InputError
from samplers.grids import training_betas
from samplers.models import ideal
from samplers.models.ideal import Gaussian, IdealModel, PointCloud, load_ideal
from samplers.models.process import Process

SIGMA = Process(sigma_range=(0.002, 80.0))
DISCRETE = Process(betas=training_betas("cosine", 1000))
TIMES = [(SIGMA, 0.002), (SIGMA, 0.7), (SIGMA, 80.0), (DISCRETE, 0.0), (DISCRETE, 430.0), (DISCRETE, 999.0)]
SHAPE = (2, 2, 3)


def _normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(7).normal(size=shape)


def _states(process: Process, time: float) -> Tensor:
    _, sigma = process.coefficients(time)
    return (1 + sigma) * torch.randn(
        5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize(("process", "time"), TIMES)
def test_a_gaussian_shrinks_by_its_share_of_the_variance(process: Process, time: float) -> None:
    mean, std = _normal(*SHAPE), np.abs(_normal(*SHAPE)) + 0.1
    alpha, sigma = process.coefficients(time)
    x = _states(process, time)
    expected = sigma * (x.numpy() - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    eps = IdealModel(Gaussian(mean, std**2), process)(x, time, None).eps
    torch.testing.assert_close(eps, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    diagonal = IdealModel(Gaussian(mean, np.diag(std.reshape(-1) ** 2)), process)(x, time, None).eps
    torch.testing.assert_close(diagonal, eps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("process", "time"), TIMES)
def test_a_gaussian_with_correlated_pixels_solves_its_linear_system(process: Process, time: float) -> None:
    root = _normal(12, 7)  # a singular covariance
    covariance, mean = root @ root.T, _normal(*SHAPE)
    alpha, sigma = process.coefficients(time)
    x = _states(process, time)
    away = (x.numpy() - alpha * mean).reshape(5, 12)
    expected = sigma * np.linalg.solve(alpha**2 * covariance + sigma**2 * np.eye(12), away.T).T
    eps = IdealModel(Gaussian(mean, covariance), process)(x, time, None).eps
    torch.testing.assert_close(eps, torch.from_numpy(expected.reshape(x.shape)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("process", "time"), TIMES)
def test_the_noise_of_a_cloud_is_minus_sigma_times_the_score_of_its_mixture(
    process: Process, time: float
) -> None:
    points = _normal(6, *SHAPE)
    alpha, sigma = process.coefficients(time)
    # Near the points, where more than one of them has weight.
    x = alpha * torch.from_numpy(points[:5]) + sigma * _states(SIGMA, 0.002)
    x.requires_grad_()
    distances = (x[:, None] - alpha * torch.from_numpy(points)[None]).flatten(2).square().sum(dim=2)
    (score,) = torch.autograd.grad(torch.logsumexp(-distances / (2 * sigma**2), dim=1).sum(), x)
    eps = IdealModel(PointCloud(points), process)(x.detach(), time, None).eps
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-7, atol=1e-7)


def test_the_noise_of_one_point_at_the_origin_is_x_over_sigma() -> None:
    model = IdealModel(PointCloud(np.zeros((1, *SHAPE))), SIGMA)
    x = _states(SIGMA, 3.0)
    torch.testing.assert_close(model(x, 3.0, None).eps, x / 3.0, rtol=1e-15, atol=0)


def test_little_noise_leads_to_the_nearest_point_and_much_noise_to_the_mean() -> None:
    points = _normal(50, *SHAPE)
    model = IdealModel(PointCloud(points), Process(sigma_range=(1e-4, 1e6)))
    x = torch.from_numpy(_normal(4, *SHAPE) + 0.1)
    distances = ((x.numpy()[:, None] - points[None]) ** 2).sum(axis=(2, 3, 4))
    near = x - 1e-3 * model(x, 1e-3, None).eps
    torch.testing.assert_close(near, torch.from_numpy(points[distances.argmin(axis=1)]), rtol=0, atol=1e-12)
    far = 1e6 * torch.ones_like(x)
    torch.testing.assert_close(
        far - 1e6 * model(far, 1e6, None).eps,
        torch.from_numpy(points.mean(axis=0)).expand_as(x),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "distribution", [PointCloud(_normal(40, *SHAPE)), Gaussian(_normal(*SHAPE), np.eye(12))]
)
def test_float32_states_get_the_float64_answer_rounded_in_any_batch(
    distribution: ideal.Distribution,
) -> None:
    model = IdealModel(distribution, SIGMA)
    x = _states(SIGMA, 0.5).float()
    said = model(x, 0.5, None)
    assert said.v is None
    assert said.eps.dtype == torch.float32
    exact = model(x.double(), 0.5, None).eps
    torch.testing.assert_close(said.eps.double(), exact, rtol=1.2e-7, atol=0)
    alone = torch.cat([model(x[i : i + 1].double(), 0.5, None).eps for i in range(5)])
    torch.testing.assert_close(alone, exact, rtol=1e-12, atol=1e-13)


def test_a_batch_too_large_for_the_memory_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = IdealModel(PointCloud(_normal(40, *SHAPE)), SIGMA)
    x = _states(SIGMA, 0.5)
    whole = model(x, 0.5, None).eps
    monkeypatch.setattr(ideal, "_PAIRS", 90)
    torch.testing.assert_close(model(x, 0.5, None).eps, whole, rtol=1e-12, atol=1e-13)


def test_a_described_cloud_or_gaussian_needs_no_file() -> None:
    cloud = load_ideal(None, {"shape": [3, 4, 4], "points": 5, "seed": 2})
    assert (cloud.shape, cloud.time, cloud.sigma_range) == ((3, 4, 4), "sigma", (0.002, 80.0))
    (points,) = cloud.distribution.arrays
    assert points.shape == (5, 3, 4, 4)
    assert 0.9 < abs(points).max() <= 1
    again = load_ideal(None, {"shape": [3, 4, 4], "points": 5, "seed": 2})
    assert again.fingerprint == cloud.fingerprint
    assert load_ideal(None, {"shape": [3, 4, 4], "points": 5}).fingerprint != cloud.fingerprint
    options = {"shape": [1, 2, 2], "mean": 0.5, "std": 2, "time": "discrete", "diffusion_steps": 100}
    gaussian = load_ideal(None, options)
    assert gaussian.betas is not None
    assert gaussian.betas.shape == (100,)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = gaussian.process.coefficients(60.0)
    expected = sigma * (1 - alpha * 0.5) / (alpha**2 * 4 + sigma**2)
    assert gaussian(x, 60.0, None).eps.flatten().tolist() == pytest.approx([expected] * 4)


def test_files_hold_clouds_or_gaussians(tmp_path: Path) -> None:
    pixels = np.arange(2 * 12, dtype=np.uint8).reshape(2, *SHAPE)
    np.save(tmp_path / "cloud.npy", pixels)
    cloud = load_ideal(tmp_path / "cloud.npy", {})
    assert np.array_equal(cloud.distribution.arrays[0], pixels / 127.5 - 1)
    points = _normal(3, *SHAPE).astype(np.float32)
    np.savez(tmp_path / "cloud.npz", points=points)
    assert np.array_equal(load_ideal(tmp_path / "cloud.npz", {}).distribution.arrays[0], points)
    mean = _normal(*SHAPE)
    np.savez(tmp_path / "normal.npz", mean=mean, std=0.5)
    np.savez(tmp_path / "full.npz", mean=mean, covariance=0.25 * np.eye(12))
    x = _states(SIGMA, 1.0)
    torch.testing.assert_close(
        load_ideal(tmp_path / "normal.npz", {})(x, 1.0, None).eps,
        load_ideal(tmp_path / "full.npz", {})(x, 1.0, None).eps,
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.zeros((3, 4))}, r"\[N, C, H, W\], not one of shape \[3, 4\]"),
        ({"points": np.full((1, 1, 1, 1), np.nan)}, "'points' holds NaN"),
        ({"points": np.full((1, 1, 1, 1), "a")}, "'points' holds .*, not numbers"),
        ({"mean": np.zeros((1, 2, 2))}, r"needs the arrays .*\['mean'\]"),
        ({"mean": np.zeros(4), "std": np.ones(4)}, r"mean of a Gaussian is an array \[C, H, W\]"),
        ({"mean": np.zeros((1, 2, 2)), "std": np.ones(3)}, r"std of shape \[3\] does not fit"),
        ({"mean": np.zeros((1, 2, 2)), "covariance": np.eye(3)}, r"covariance of shape \[3, 3\] does not"),
        ({"mean": np.zeros((1, 2, 2)), "covariance": -np.eye(4)}, "negative eigenvalues"),
        ({"mean": np.zeros((1, 2, 2)), "covariance": np.triu(np.ones((4, 4)))}, "symmetric"),
    ],
)
def test_arrays_that_describe_no_distribution_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"bad\.npz: .*" + message):
        load_ideal(tmp_path / "bad.npz", {})


def test_unreadable_files_are_named_and_nothing_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.npy: cannot be read: No such file"):
        load_ideal(tmp_path / "absent.npy", {})
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    for name in ("objects", "text"):
        with pytest.raises(InputError, match=rf"{name}\.npy: is damaged or no \.npy"):
            load_ideal(tmp_path / f"{name}.npy", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs model\.path, or model\.options\.shape"),
        ({"shape": [1, 2, 2]}, "give one of points and std"),
        ({"shape": [1, 2, 2], "points": 3, "std": 1}, "give one of points and std"),
        ({"shape": [1, 2, 2], "points": 3, "mean": 1}, "mean belongs to std"),
        ({"shape": [1, 2, 2], "std": 1, "mean": float("inf")}, "must be finite"),
        ({"shape": [1, 2], "points": 3}, r"model\.options\.shape"),
        ({"shape": [1, 2, 2], "points": 3, "time": "log"}, r"model\.options\.time: .*'log'"),
        ({"shape": [1, 2, 2], "points": 3, "bias": 1}, "no option 'bias'"),
    ],
)
def test_descriptions_that_say_too_little_or_too_much_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_ideal(None, options)


def test_a_file_and_a_description_exclude_each_other(tmp_path: Path) -> None:
    np.save(tmp_path / "cloud.npy", np.zeros((2, 1, 2, 2)))
    with pytest.raises(InputError, match=r"model\.options\.points and model\.path exclude each other"):
        load_ideal(tmp_path / "cloud.npy", {"points": 3})


def test_the_fingerprint_follows_distribution_and_process() -> None:
    points = _normal(3, *SHAPE)
    models = [
        IdealModel(PointCloud(points), SIGMA),
        IdealModel(PointCloud(2 * points), SIGMA),
        IdealModel(PointCloud(points), DISCRETE),
        IdealModel(PointCloud(points), Process(sigma_range=(0.002, 70.0))),
        IdealModel(PointCloud(points), Process(betas=training_betas("linear", 1000))),
    ]
    assert len({model.fingerprint for model in models}) == 5
    assert models[0].fingerprint == IdealModel(PointCloud(points.copy()), SIGMA).fingerprint
