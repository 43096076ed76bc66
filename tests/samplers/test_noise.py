"""samplers.noise: known answers of Philox, independence of batch, and the distributions."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from samplers import noise


def _plain_philox(counter, key):
    """Philox4x32-10 on Python integers, written from the paper's definition."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the known-answer vectors published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == answer == _plain_philox(counter, key)


def test_philox_agrees_with_plain_integers_on_random_counters():
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4))
    key = (12345 << 20) % 2**32, (12345 << 20) >> 32
    words = noise.philox(tuple(torch.from_numpy(c) for c in counters.T.copy()), key)
    expected = [_plain_philox([int(c) for c in row], key) for row in counters]
    assert torch.stack(words, 1).tolist() == [list(e) for e in expected]


def test_an_image_gets_the_same_noise_in_any_batch_and_order():
    whole = noise.normal(7, torch.arange(1000), 3, (3, 5, 7), torch.float32)
    ids = torch.tensor([999, 0, 17, 512])
    assert torch.equal(noise.normal(7, ids, 3, (3, 5, 7), torch.float32), whole[ids])
    assert torch.equal(noise.normal(7, ids, 3, (3, 5, 7), torch.float64), whole[ids].double())


def test_seed_image_and_draw_all_change_the_noise():
    def draw(seed, image, step):
        return noise.normal(seed, torch.tensor([image]), step, (64,), torch.float32)

    base = draw(0, 0, 0)
    for other in (draw(1, 0, 0), draw(2**40, 0, 0), draw(0, 1, 0), draw(0, 2**33, 0), draw(0, 0, 1)):
        assert abs(float(torch.corrcoef(torch.cat([base, other]))[0, 1])) < 0.5
        assert not torch.equal(base, other)


def test_normal_numbers_are_standard_normal_and_uncorrelated():
    z = noise.normal(0, torch.arange(4000), 1, (2, 5, 5), torch.float64)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(z.flatten(1).T) - torch.eye(50)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_uniform_numbers_are_uniform_inside_the_open_interval():
    u = noise.uniform(3, torch.arange(5000), noise.PRIOR_DRAW, 3)
    assert u.shape == (5000, 3)
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


def test_labels_cover_every_class_evenly():
    labels = noise.labels(0, torch.arange(20000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_what_is_compiled_for_gpus_traces_as_one_graph_with_the_same_bits():
    traced = torch.compile(noise._box_muller, backend="eager", fullgraph=True, dynamic=True)
    counter, key = noise._counter(torch.tensor([0, 7, 2**33]), 4, 5), noise._key(2**40 + 3)
    words = tuple(torch.full_like(counter[1], word) for word in key)
    expected = noise.normal(2**40 + 3, torch.tensor([0, 7, 2**33]), 4, (20,), torch.float32)
    assert torch.equal(traced(counter, words), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_makes_the_same_noise_in_one_kernel():
    ids = torch.tensor([0, 7, 2**33, 12345])
    noise._fused.failed = False
    with warnings.catch_warnings(action="error"):
        fast = noise.normal(2**40 + 3, ids.cuda(), 4, (3, 64, 64), torch.float32)
    assert not noise._fused.failed
    counter = noise._counter(ids.cuda(), 4, 3 * 64 * 16)
    words = noise.philox(counter, noise._key(2**40 + 3))
    assert torch.equal(torch.stack(words).cpu(), torch.stack(noise._words(2**40 + 3, ids, 4, 3 * 64 * 16)))
    plain = noise._box_muller(counter, noise._key(2**40 + 3)).reshape(fast.shape)
    exact = noise.normal(2**40 + 3, ids, 4, (3, 64, 64), torch.float32)
    # log and cos are rounded differently, which one number in many millions shows in its last bit.
    for other in (plain, exact.cuda()):
        assert (fast != other).sum() <= 1
        assert torch.allclose(fast, other, rtol=3e-7, atol=1e-12)
