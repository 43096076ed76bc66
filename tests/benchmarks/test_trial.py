"""benchmarks.trial: kernels are told apart, and the parts of a real trial are there."""

import math
from pathlib import Path

import pytest

from benchmarks import trial
from benchmarks.common import DEMO


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolutions and matrix products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "convolutions and matrix products"),
        ("aten::mkldnn_convolution", "convolutions and matrix products"),
        ("aten::addmm", "convolutions and matrix products"),
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("triton_red_fused__to_copy_native_group_norm_7", "norms"),
        ("triton_per_fused__to_copy_mean_silu_12", "norms"),
        ("aten::native_group_norm", "norms"),
        ("triton_poi_fused__to_copy_add_convolution_3", "elementwise"),
        ("aten::silu", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::cat", "copies"),
        ("aten::empty", "other"),
    ],
)
def test_a_kernel_is_told_by_its_name(kernel, wanted):
    assert trial.purpose(kernel) == wanted


def test_the_parts_of_a_trial_make_up_its_time_and_the_shares_of_its_kernels_one(monkeypatch):
    monkeypatch.setattr(trial, "_ROUNDS", 1)
    found = trial.measure(Path(DEMO), 250)
    (parts,) = found["nfe"].values()
    assert math.fsum(t for name, t in parts.items() if name != "trial") == pytest.approx(parts["trial"])
    assert parts["network"] > parts["solver"] > 0
    assert math.fsum(found["kernels"].values()) == pytest.approx(1)
    assert found["kernels"]["convolutions and matrix products"] > 0.1
    assert found["share_of_matrix_rate"] > 0
    assert "where its time goes: " in "\n".join(trial.table(found))
