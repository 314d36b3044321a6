"""The profile of a step: kernels are put where they belong by name and phase, and the floor counts every product."""

import pytest
import torch
from torch import nn

import step_profile
from step_profile import kind_of, matmul_shapes, profile_table, sum_kernels
from utils import SettingsError


@pytest.mark.parametrize(
    ("kernel", "phase", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "forward_pass", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "backward_pass", "matrix products"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn", "loss", "matrix products"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "backward_pass", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "backward_pass", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "backward_pass", "attention"),
        ("triton_poi_fused_gelu_gelu_backward_view_4", "backward_pass", "GELU"),
        ("triton_per_fused_add_native_layer_norm_view_5", "forward_pass", "norms"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "forward_pass", "norms"),
        ("triton_red_fused__to_copy_gather_logsumexp_select_sub", "loss", "loss"),
        ("chunk_loss_kernel", "loss", "loss"),
        ("chunk_scale_kernel", "backward_pass", "loss"),
        ("nll_loss_backward_reduce_cuda_kernel_2d", "backward_pass", "loss"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata>", "optimizer_step", "optimizer"),
        ("Memset (Device)", "backward_pass", "copies"),
        ("triton_poi_fused_stack_transpose_8", "backward_pass", "copies"),
        ("void at::native::reduce_kernel<128, 4, ...>", "backward_pass", "other"),
    ],
)
def test_kinds(kernel, phase, kind):
    assert kind_of(kernel, phase) == kind


def event(name: str, category: str, begin: float, duration: float, **arguments) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": duration, "args": arguments}


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    """The GPU runs it later, while the host is in another phase; two steps are averaged, a mark is no kernel."""
    trace = {
        "traceEvents": [
            event("phase: training_step", "user_annotation", 0, 1000),
            event("phase: loss", "user_annotation", 100, 50),
            event("phase: optimizer_step", "user_annotation", 200, 50),
            event("cudaLaunchKernel", "cuda_runtime", 110, 2, correlation=1),
            event("cuLaunchKernelEx", "cuda_driver", 210, 2, correlation=2),
            event("cudaLaunchKernel", "cuda_runtime", 300, 2, correlation=3),
            event("elementwise_kernel", "kernel", 205, 4000, correlation=1),
            event("elementwise_kernel", "kernel", 5000, 2000, correlation=2),
            event("nvjet_sm90", "kernel", 8000, 6000, correlation=3),
            event("Memcpy DtoD", "gpu_memcpy", 15000, 1000),
            {"ph": "i", "name": "mark", "ts": 3},
        ]
    }
    totals, busy = sum_kernels(trace, 2)
    assert totals == {"loss": 2.0, "optimizer": 1.0, "matrix products": 3.0, "copies": 0.5}
    assert busy == 6.5
    trace["traceEvents"].append(event("Memcpy DtoH", "gpu_memcpy", 8500, 6000))  # beside the product, 500 longer
    assert sum_kernels(trace, 2)[1] == 6.75


def test_every_linear_layer_has_three_products():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 32, bias=False))
    shapes = matmul_shapes(model, 100)
    assert shapes == {
        (100, 8, 32, "right"): 2,
        (100, 32, 8, "none"): 2,
        (32, 100, 8, "left"): 2,
        (100, 32, 8, "right"): 1,
        (100, 8, 32, "none"): 1,
        (8, 100, 32, "left"): 1,
    }
    flops = sum(2 * a * b * c * count for (a, b, c, _), count in shapes.items())
    assert flops == 6 * 100 * (8 * 32 * 3)


def test_table():
    result = {
        "categories": [{"name": "loss", "ms": 1.5, "share": 0.15}, {"name": "idle", "ms": 8.5, "share": 0.85}],
        "step_ms": 10.0,
        "matmul_tflop": 2.0,
        "matmul_floor_ms": 4.0,
        "matmul_dtype": "bfloat16",
    }
    table = profile_table(result)
    assert "15.0 %" in table
    assert "products alone in bfloat16, 2.00 TFLOP at 500 TFLOP/s: 4.00 ms" in table


def test_main_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["step_profile.py"])
    with pytest.raises(SettingsError, match="finds no GPU"):
        step_profile.main()
