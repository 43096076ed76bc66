"""search.ms_eps: Γ of a job comes from its images once, from a file where one is given, and is refused elsewhere."""

import numpy as np
import pytest
import torch

from samplers.errors import InputError
from samplers.models.ideal import load_ideal
from search import ms_eps
from search.spec import parse

CPU = torch.device("cpu")
COUNT = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def network():
    options = {"shape": [1, 8, 8], "points": 5, "time": "discrete", "diffusion_steps": 30}
    return load_ideal(None, options)


@pytest.fixture
def job(tmp_path):
    """job(data, **sampling): a job of Analytic-DPM with twelve images in images.npz."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)

    def make(data=None, **sampling):
        content = {
            "model": {"name": "m", "format": "ideal"},
            "dataset": {"name": "d", **(data or {"reference": "images.npz"})},
            "features": "digits",
            "sampling": {"solver": "analytic_ddpm", "nfe": 5, **sampling},
        }
        return parse(content, "job.yaml", tmp_path)

    return make


def test_statistics_are_estimated_once_and_kept_beside_the_reference_statistics(job, network, own_cache):
    seen = []
    first = ms_eps.complete(job(nfe=[5, 9]), network, CPU, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (COUNT * 30, COUNT * 30)
    (file,) = own_cache.iterdir()
    assert [ready.sampling.ms_eps for ready in first] == [str(file), str(file)]
    assert [ready.sampling.nfe for ready in first] == [5, 9]
    assert len({ready.ms_eps for ready in first}) == 1
    seen.clear()
    assert ms_eps.complete(job(nfe=[5, 9]), network, CPU, lambda *now: seen.append(now)) == first
    assert seen == []


def test_another_number_of_images_gives_other_statistics_unless_there_are_no_more(job, network, own_cache):
    known = [ms_eps.complete(job(ms_eps_images=n), network, CPU)[0].ms_eps for n in (6, COUNT, 2 * COUNT)]
    assert known[0] != known[1] == known[2]
    assert len(list(own_cache.iterdir())) == 2


def test_the_images_of_the_dataset_go_before_its_reference(job, network, own_cache):
    (direct,) = ms_eps.complete(job(), network, CPU)
    (beside,) = ms_eps.complete(job({"reference": "digits", "images": "images.npz"}), network, CPU)
    assert beside == direct


def test_a_file_is_known_by_its_content_wherever_it_lies(job, network, own_cache, tmp_path):
    for name, last in (("a.pth", 1), ("b.pth", 1), ("c.pth", 0.5)):
        torch.save(np.linspace(0, last, 31, dtype=np.float32), tmp_path / name)
    a, b, c = (
        ms_eps.complete(job(ms_eps=name), network, CPU)[0].ms_eps for name in ("a.pth", "b.pth", "c.pth")
    )
    assert a == b != c
    assert not own_cache.exists()


def test_what_needs_no_statistics_stays_as_it_is(job, network, own_cache):
    for sampling in ({"variance": "fixed_small"}, {"solver": "ddim"}, {"solver": "ldm_ddim"}):
        spec = job({"reference": "digits"}, **sampling)
        assert ms_eps.complete(spec, network, CPU) == (ms_eps.Complete(spec.sampling[0]),)
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"reference": "digits"},
            "dataset.reference: 'digits' is statistics. .*dataset.images.*sampling.ms_eps",
        ),
        ({"reference": "statistics.npz"}, "statistics.npz: has the arrays mu, sigma.*dataset.images"),
        ({"reference": "digits", "images": "absent"}, "absent: no such file or folder.*dataset.images"),
        ({"reference": "digits", "images": "empty"}, "empty: no images found.*dataset.images"),
    ],
)
def test_a_dataset_without_images_is_refused(job, network, tmp_path, data, message):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        ms_eps.complete(job(data), network, CPU)


def test_a_network_with_classes_needs_a_file(job, network):
    network.num_classes = 10
    with pytest.raises(
        InputError, match="sampling.ms_eps: analytic_ddpm estimates Γ for networks without classes"
    ):
        ms_eps.complete(job(), network, CPU)
