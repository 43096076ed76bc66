"""samplers.generate: an image depends on its id, the seed and the schedule, and on nothing else."""

import math
from dataclasses import replace

import pytest
import torch

from samplers.errors import NonFiniteError
from samplers.generate import Sampler
from samplers.models.compiled import make_fast
from samplers.models.load import load_model
from samplers.sampling import DDIM, DDPM, EDM, LDM
from samplers.schedule import Schedule

CPU = torch.device("cpu")
SOLVERS = {
    "ddpm": (DDPM("ddpm", 6), "discrete"),
    "ddim": (DDIM("ddim", 5, eta=0.5), "discrete"),
    "heun with churn": (EDM("heun", 7, S_churn=10), "sigma"),
}


def cloud(time):
    return load_model("ideal", None, {"time": time, "shape": [2, 4, 4], "points": 5, "seed": 1})


@pytest.mark.parametrize("name", SOLVERS)
def test_images_do_not_depend_on_range_or_micro_batch(name):
    sampling, time = SOLVERS[name]
    schedule = Schedule.uniform(sampling.nfe, 1.02)
    whole = Sampler(cloud(time), sampling, CPU, seed=3).images(schedule, 0, 50)
    assert whole.shape == (50, 2, 4, 4)
    assert whole.dtype == torch.uint8
    parts = Sampler(cloud(time), sampling, CPU, seed=3, micro_batch=7)
    again = torch.cat([parts.images(schedule, 0, 13), parts.images(schedule, 13, 50)])
    assert torch.equal(whole, again)


@pytest.mark.parametrize("name", SOLVERS)
def test_seed_and_schedule_change_the_images(name):
    sampling, time = SOLVERS[name]
    first = Sampler(cloud(time), sampling, CPU, seed=0).images(Schedule.uniform(sampling.nfe, 1.0), 0, 20)
    for seed, b in ((1, 1.0), (0, 1.3)):
        other = Sampler(cloud(time), sampling, CPU, seed=seed).images(
            Schedule.uniform(sampling.nfe, b), 0, 20
        )
        assert not torch.equal(first, other)


def test_images_go_from_noise_to_pixels_batch_by_batch():
    schedule = Schedule.uniform(6, 1.02)
    seen = []
    sampler = Sampler(cloud("discrete"), DDPM("ddpm", 6), CPU, micro_batch=20)
    sampler.images(schedule, 0, 50, lambda t, x, eps: seen.append((t, len(x), len(eps))))
    assert seen == [(t, n, n) for n in (20, 20, 10) for t in reversed(range(6))]


@pytest.mark.parametrize(("shape", "size"), [((1, 8, 8), 250), ((3, 32, 32), 5), ((3, 256, 256), 1)])
def test_a_call_on_a_processor_has_what_its_caches_hold(shape, size):
    model = load_model("ideal", None, {"time": "discrete", "shape": shape, "points": 2, "seed": 1})
    assert Sampler(model, DDPM("ddpm", 6), CPU).fitted().size == size


def test_an_exact_denoiser_of_a_point_cloud_samples_its_points():
    model = cloud("discrete")
    images = Sampler(model, DDIM("ddim", 50), CPU).images(Schedule.uniform(50, 1.0), 0, 200)
    points = model.pixels(torch.from_numpy(model.distribution.arrays[0])).double()
    gaps = (images.double().flatten(1)[:, None] - points.flatten(1)[None]).abs().amax(2).amin(1)
    assert (gaps <= 1).float().mean() > 0.95


def test_images_that_are_not_finite_are_refused():
    class Diverging:
        def __getattr__(self, name):
            return getattr(cloud("discrete"), name)

        def __call__(self, x, time, labels):
            return cloud("discrete")(x, time, labels)._replace(eps=torch.full_like(x, math.nan))

    sampler = Sampler(Diverging(), DDPM("ddpm", 5), CPU)
    with pytest.raises(NonFiniteError, match="not finite"):
        sampler.images(Schedule.uniform(5, 1.0), 0, 4)


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(AssertionError, match="4 λ for 6 evaluations"):
        Sampler(cloud("discrete"), DDPM("ddpm", 6), CPU).images(Schedule.uniform(4, 1.0), 0, 4)


def test_a_class_conditional_network_gets_the_labels_of_the_images(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x, t, labels):\n"
        "        return x - (labels.float() / 4 - 0.5)[:, None, None, None]\n"
        "def make():\n"
        "    return Net()\n"
    )
    options = {"shape": [1, 2, 2], "time": "discrete", "prediction": "epsilon", "num_classes": 4}
    model = load_model("python", "net.py:make", options, tmp_path)
    sampling = DDPM("ddpm", 5)
    whole = Sampler(model, sampling, CPU).images(Schedule.uniform(5, 1.0), 0, 64)
    split = Sampler(model, sampling, CPU, micro_batch=5).images(Schedule.uniform(5, 1.0), 32, 64)
    assert torch.equal(whole[32:], split)
    assert len(whole.flatten(1).unique(dim=0)) > 4


@pytest.mark.parametrize(
    ("time", "sampling", "evaluations"),
    [
        ("discrete", DDPM("ddpm", 20), [4, 3, 2, 1, 0]),
        ("discrete", DDIM("ddim", 3, eta=0.5), [2, 1, 0]),
        ("sigma", EDM("heun", 9), [4, 3, 2, 1, 0]),
        ("sigma", EDM("euler", 9), [4, 3, 2, 1, 0]),
        ("discrete", LDM("ldm_ddim", 50), [0]),
    ],
)
def test_a_rehearsal_is_of_one_micro_batch_and_the_last_evaluations(time, sampling, evaluations):
    model, asked = cloud(time), []

    class Asked:
        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, x, time, labels):
            asked.append((len(x), time))
            return model(x, time, labels)

    Sampler(Asked(), sampling, CPU, micro_batch=6).rehearse()
    times = sampling.plan(model).times
    assert asked == [(6, float(times[t])) for t in evaluations]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_an_image_has_the_same_bits_in_every_range():
    gpu, half = torch.device("cuda"), torch.float16
    model = load_model("digits", None, {}).to(gpu)
    make_fast(model, gpu, half)
    sampler = Sampler(model, DDPM("ddpm", 5), gpu, seed=3, precision=half, micro_batch=16)
    sampler.warm_up()
    schedule = Schedule.uniform(5, 1.02)
    whole = sampler.images(schedule, 0, 50)
    parts = [sampler.images(schedule, a, b) for a, b in ((0, 13), (13, 14), (14, 50))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_a_call_takes_no_more_than_there_is_room_for(monkeypatch):
    gpu = torch.device("cuda")
    sampler = Sampler(load_model("digits", None, {}).to(gpu), DDPM("ddpm", 5), gpu)
    assert sampler.fitted().size == 1250
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    assert sampler.fitted().size < 50
    assert replace(sampler, micro_batch=300).fitted().size == 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_memory_does_not_grow_with_the_number_of_images():
    gpu = torch.device("cuda")
    model = load_model("ideal", None, {"time": "discrete", "shape": [3, 32, 32], "points": 2, "seed": 1})
    sampler = Sampler(model.to(gpu), DDPM("ddpm", 3), gpu, micro_batch=50)
    peaks = []
    for count in (100, 100, 1000):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sampler.images(Schedule.uniform(3, 1.0), 0, count)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] - peaks[1] <= 3 * 1000 * 3 * 32 * 32  # the images, and once more where they are joined
