"""Splits the time of a trial into its parts, next to the pure network, and says how much of the machine that uses.

    python -m benchmarks.trial [JOB.yaml] [--images N] [--json]

The pure network is NFE calls on the same images, nothing else; a trial's time over it is what lamtune adds. Parts are
timed one after the other with the device waited for, and the trial as it runs, so that `rest` is what they overlap
(negative) or what none of them is. Operations and bytes are counted: those of convolutions, matrix products and
attention, as if everything between were fused into them. What the machine can do is measured, with one large matrix
product and one large copy. Where the network's own time goes is what torch's profiler saw in one call of it.
"""

import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    Case,
    Found,
    Part,
    grid,
    load_case,
    main,
    megabytes,
    milliseconds,
    once,
    peaks,
    seconds,
)
from objectives.influence import Sensitivity
from objectives.moments import Moments
from samplers import noise
from samplers.prediction import Prediction
from samplers.schedule import Schedule
from search.evaluator import BLOCK

NFES = (20, 100)
_ROUNDS = 3
_HEAVY = ("convolution", "mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")
# What a kernel of a GPU, or an operator on a processor, is for, by its name; the first that fits counts.
_KERNELS = (
    ("norms", r"^triton_(red|per)"),  # first: what torch compiles is named after all that it has fused
    ("elementwise", r"^triton_poi|^cpp_fused"),
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    (
        "convolutions and matrix products",
        r"conv|gemm|cutlass|xmma|cudnn|nvjet|winograd|mm\b|mkldnn|onednn|linear",
    ),
    ("norms", r"norm|reduce|mean|var"),
    ("elementwise", r"elementwise|vectorized|silu|sigmoid|add|mul|div|sub"),
    ("copies", r"mem(cpy|set)|copy|cat|clone|fill|contiguous"),
)


class _Bytes(TorchDispatchMode):
    """Counts what convolutions, matrix products and attention read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0].startswith(_HEAVY):
            first = result[0] if isinstance(result, tuple) else result
            tensors = [a for a in (*args, first) if isinstance(a, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of a large matrix product, bytes per second of a large copy."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.empty(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size**3 / seconds(lambda: a @ a, 5), 2 * length / seconds(lambda: target.copy_(source), 5)


@torch.no_grad()
def counted(case: Case) -> tuple[float, float]:
    """Operations and bytes of one network call per image, counted on the network as it is written."""
    count = min(4, case.sampler.size)
    model = case.evaluator.model
    network = getattr(model, "network", None)
    plain = getattr(network, "network", network)  # inside its compiled form
    x = case.batch(count)
    try:
        if network is not None:
            model.network = plain  # type: ignore[attr-defined]
        with FlopCounterMode(display=False) as flops:
            case.network(count)(x, 0)
        with _Bytes() as bytes_:
            case.network(count)(x, 0)
    finally:
        if network is not None:
            model.network = network  # type: ignore[attr-defined]
    return flops.get_total_flops() / count, bytes_.total / count


@torch.no_grad()
def kernels(case: Case) -> dict[str, float]:
    """Shares of the network's time in one call, by what its kernels are for."""
    x, network = case.batch(case.sampler.size), case.network(case.sampler.size)
    network(x, 0)
    gpu = case.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on a processor that there is no GPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as seen:
        network(x, 0)
        if gpu:
            torch.cuda.synchronize()
    found: defaultdict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        # On a GPU the kernels themselves: what launched them, and notes about them, would count their time again.
        if gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        taken = event.self_device_time_total if gpu else event.self_cpu_time_total
        if taken > 0:
            found[purpose(event.key)] += taken
    total = math.fsum(found.values())
    return {name: taken / total for name, taken in sorted(found.items(), key=lambda one: -one[1])}


def purpose(kernel: str) -> str:
    """What a kernel is for."""
    return next((name for name, words in _KERNELS if re.search(words, kernel, re.IGNORECASE)), "other")


@torch.no_grad()
def split(case: Case, images: int) -> dict[str, float]:
    """Seconds of each part of a trial."""
    evaluator, sampling, sampler = case.evaluator, case.sampling, case.sampler
    model, device, nfe = evaluator.model, case.device, case.sampling.nfe
    schedule, plan = Schedule.uniform(nfe, 1.0), case.sampling.plan(model)
    x, network = case.batch(sampler.size), case.network(sampler.size)
    calls = -(-images // sampler.size)
    answer = network(x, 0)
    ids = torch.arange(images, device=device)
    pictures = torch.randint(0, 256, (images, *model.image_shape), dtype=torch.uint8, device=device)
    features = torch.cat([evaluator.extractor(pictures[i : i + BLOCK]) for i in range(0, images, BLOCK)])
    moments = Moments.of(features)
    sensitivity = Sensitivity.of(evaluator.frechet, moments)

    def draws() -> None:
        for part in torch.split(ids, sampler.size):
            for t in range(nfe):
                noise.normal(0, part, t, model.shape, sampling.state_dtype)

    def solve() -> None:
        for _ in range(calls):
            plan.run(lambda x, t: Prediction(answer.eps, answer.v), schedule, x, lambda t: x, None)

    parts: dict[str, Callable[[], object]] = {
        "trial": lambda: case.trial(images),
        "network": lambda: [network(x, t) for _ in range(calls) for t in range(nfe)],
        "solver": solve,
        "noise": draws,
        "pixels": lambda: [model.pixels(x) for _ in range(calls)],
        "features": lambda: [evaluator.extractor(p) for p in torch.split(pictures, BLOCK)],
        "moments": lambda: Moments.of(features),
        "distance": lambda: (evaluator.frechet.distance(moments), Sensitivity.of(evaluator.frechet, moments)),
        "influences": lambda: sensitivity.influences(features).cpu(),
    }
    if model.gradient is not None:
        del parts["solver"]  # it would ask the classifier
    for call in parts.values():
        call()
    # In turns: where others use the machine too, all parts are disturbed alike.
    rounds = [{name: once(call) for name, call in parts.items()} for _ in range(_ROUNDS)]
    taken = {name: statistics.median(r[name] for r in rounds) for name in parts}
    return taken | {"rest": taken["trial"] - math.fsum(t for name, t in taken.items() if name != "trial")}


def measure(job: Path, images: int, nfes: tuple[int, ...] = NFES) -> Found:
    """Seconds of the parts at these NFE on a GPU, else at the job's; and the shares of the machine."""
    case = load_case(job)
    images = (
        -(-images // case.sampler.size) * case.sampler.size
    )  # whole calls, so that the network's time is its own
    gpu = case.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if not gpu or case.sampling.solver == "heun":
        nfes = (case.sampling.nfe,)
    splits = {nfe: split(case.at(nfe), images) for nfe in nfes}
    memory = peaks()
    shares = kernels(case)
    flops, moved = counted(case)
    matrix, copy = machine_rates(case.device, getattr(torch, case.evaluator.precision))
    per_call = splits[nfes[0]]["network"] / (images * nfes[0])
    return {
        "precision": case.evaluator.precision,
        "images": images,
        "batch": case.sampler.size,
        "nfe": splits,
        "flops_per_image": flops,
        "bytes_per_image": moved,
        "matrix_rate": matrix,
        "copy_rate": copy,
        "share_of_matrix_rate": flops / per_call / matrix,
        "share_of_bandwidth": moved / per_call / copy,
        "images_per_second": 1 / per_call,
        "kernels": shares,
        **memory,
    }


def table(found: Found) -> list[str]:
    """The parts in columns, one per NFE, and two sentences."""
    names = [name for name in next(iter(found["nfe"].values())) if name != "rest"] + ["rest"]
    rows: list[list[object]] = [["", *(f"NFE {nfe}  / network" for nfe in found["nfe"])]]
    for name in names:
        cells = [f"{milliseconds(t[name])} {t[name] / t['network']:8.3f}" for t in found["nfe"].values()]
        rows.append([name, *cells])
    binds = "matrix" if found["share_of_matrix_rate"] > found["share_of_bandwidth"] else "memory"
    return [
        f"{found['images']:,} images, {found['batch']} per call, {found['precision']}",
        *grid(rows),
        f"  network: {found['images_per_second']:,.0f} images/s, "
        f"{found['flops_per_image'] / 1e9:.3g} GFLOP and {megabytes(found['bytes_per_image'])} at least per image: "
        f"{found['share_of_matrix_rate']:.1%} of {found['matrix_rate'] / 1e12:.3g} TFLOP/s, "
        f"{found['share_of_bandwidth']:.1%} of {found['copy_rate'] / 1e9:,.0f} GB/s; {binds} binds first",
        "  where its time goes: "
        + ", ".join(f"{name} {share:.0%}" for name, share in found["kernels"].items()),
        f"  memory: {megabytes(found['host_peak'])} on the host, {megabytes(found['device_peak'])} on the device",
    ]


PART = Part("a trial in parts", measure, table)

if __name__ == "__main__":
    main({"trial": PART}, __doc__)
