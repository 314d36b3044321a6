"""attention_measure.py: a wrong kernel gets no time, memory is exact to the byte, every failure is a status."""

import gc
import itertools
import math
import random
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import attention_measure
import technique_bench
from attention import DTYPES, packed_attention
from attention import attention as attend
from attention_kernels import score_bias
from attention_measure import (
    DIRECTIONS,
    TENSORS,
    Bench,
    Case,
    Measurement,
    Reference,
    Timer,
    attention_by_blocks,
    attention_flops,
    case_noise,
    cell_name,
    clean,
    is_unsettled,
    make_inputs,
    measure,
    measure_memory,
    median,
    noise_floor,
    round_differences,
    visible_pairs,
)
from attention_support import FULL, unsupported_reason
from utils import SettingsError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = {"seconds": 0.001, "warm_up_seconds": 0.001}
SMALL = Case("eager", 2, 16, 3, 8, dtype="bf16")
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_collections():
    gc.freeze()  # clean() collects garbage before every case: nothing older than the test need be looked at


def change(case: Case, **changes) -> Case:
    return Case(**(vars(case) | changes))


def on_cpu(case: Case, **options) -> Measurement:
    return measure(case, CPU, options.pop("reference", None) or Reference(), **(QUICK | options))


def textbook(q, k, v, causal, window, dtype, scale=1.0, seen=None):
    """Attention with a mask written key by key; `seen` replaces the mask. (batch, tokens, heads, head_dim)."""
    tokens = q.shape[1]
    if seen is None:
        left, right = window
        seen = [
            [
                (left < 0 or j >= i - left) and (right < 0 or j <= i + right) and not (causal and j > i)
                for j in range(tokens)
            ]
            for i in range(tokens)
        ]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 * scale)
    scores = scores.masked_fill(~torch.tensor(seen, device=q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rounds_of(*rounds: list[float], case: Case = SMALL) -> Measurement:
    """A made-up measurement: a round is a list of milliseconds of both directions together."""
    return Measurement(
        case,
        rounds=[
            {"forward": [t / 4 for t in r], "backward": [t * 3 / 4 for t in r], "forward_backward": r} for r in rounds
        ],
    )


# --------------------------------------------------------------------------------------------------------------- work


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_are_those_of_a_brute_force_count(tokens, causal):
    lefts = {-1, 0, 1, tokens - 2, tokens - 1, tokens}
    rights = {-1, 0, 1, 3, tokens - 1, tokens}
    for left, right in itertools.product(lefts, rights):
        count = 0
        for query, key in itertools.product(range(tokens), repeat=2):
            seen = (left < 0 or query - key <= left) and (right < 0 or key - query <= right)
            count += seen and not (causal and key > query)
        assert visible_pairs(tokens, causal, (left, right)) == count, (left, right)


def test_flops_by_hand():
    full = Case("eager", 2, 16, 3, 8, causal=False)
    assert attention_flops(full, "forward") == 4 * 2 * 3 * 8 * 256 == 49152
    assert attention_flops(full, "backward") == 2.5 * 49152
    assert attention_flops(full, "forward_backward") == 3.5 * 49152
    assert attention_flops(change(full, causal=True), "forward") == 49152 / 2
    # rows of 1, 2, 3 keys, then 13 rows of 4; two-sided: 16 rows of 3 without the two ends
    assert attention_flops(change(full, causal=True, window=(3, 0)), "forward") == 4 * 2 * 3 * 8 * (1 + 2 + 3 + 13 * 4)
    assert attention_flops(change(full, window=(1, 1)), "forward") == 4 * 2 * 3 * 8 * (16 * 3 - 2)
    assert attention_flops(change(full, causal=True, window=(0, 0)), "backward") == 2.5 * 4 * 2 * 3 * 8 * 16
    assert attention_flops(change(full, backend="varlen", layout="packed", dtype="fp32"), "forward") == 49152


def test_flops_of_the_published_cell():
    cell = Case("flash_attn", 32, 1024, 32, 64, causal=False, layout="packed")
    assert attention_flops(cell, "forward") == 4 * 32 * 1024**2 * 2048 == 274_877_906_944


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_layouts_hold_the_same_numbers(dtype):
    case = change(SMALL, dtype=dtype)
    parts, upstream = make_inputs(case, CPU)
    (packed,), packed_upstream = make_inputs(change(case, layout="packed", backend="sdpa"), CPU)
    assert packed.shape == (2, 16, 3, 3, 8)
    for part, other in zip(parts, packed.unbind(2), strict=True):
        assert part.shape == (2, 16, 3, 8) and part.dtype == DTYPES[dtype]
        assert torch.equal(part, other)
    assert torch.equal(upstream, packed_upstream)
    assert all(x.requires_grad and x.is_leaf for x in (*parts, packed)) and not upstream.requires_grad
    everything = torch.stack([*parts, upstream]).float()
    assert len({tuple(x.flatten().tolist()) for x in everything}) == 4  # four different tensors
    assert abs(everything.mean()) < 0.1 and abs(everything.std() - 1) < 0.1
    again, upstream_again = make_inputs(case, CPU)
    torch.randn(3)  # the global generator has no part in it
    assert all(torch.equal(a, b) for a, b in zip([*parts, upstream], [*again, upstream_again], strict=True))
    assert sum(x.untyped_storage().nbytes() for x in (*parts, upstream)) == case.inputs_bytes


def test_name_of_a_cell():
    assert cell_name(SMALL) == "batch 2, context 16, 3 heads of 8, causal, separate, bf16"
    windowed = change(SMALL, causal=False, window=(5, 0), layout="packed", dtype="fp32", backend="sdpa")
    assert cell_name(windowed) == "batch 2, context 16, 3 heads of 8, not causal, window 5, packed, fp32"


# ------------------------------------------------------------------------------------------------------------- parity


def gradients_of(output, leaves, upstream):
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize(
    ("causal", "window"), [(True, FULL), (False, FULL), (True, (0, 0)), (True, (37, 0)), (False, (3, 2))]
)
def test_attention_by_blocks_is_plain_attention(monkeypatch, causal, window):
    pairs, tokens = 56, 400
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(pairs, tokens, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    output = textbook(*(x[:, :, None] for x in leaves), causal, window, torch.float64)[:, :, 0]
    exact = gradients_of(output, leaves, tensors[3])
    blocks = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda out, *rest: blocks.append(out.shape[1]) or grad(out, *rest))
    for ours, right in zip(attention_by_blocks(tensors, causal, window, torch.float64), exact, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)
    assert len(blocks) > 2 and sum(blocks) == tokens and blocks[-1] < blocks[0]  # uneven, and several


def test_attention_by_blocks_in_the_dtype_of_the_kernel():
    """Results of 16 bits come back in fp32, with the error of 16 bits."""
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(3, 20, 8, generator=generator) for _ in range(4)]
    exact = attention_by_blocks(tensors, True, FULL, torch.float64)
    for dtype, low, high in ((torch.bfloat16, 1e-4, 0.1), (torch.float32, 1e-9, 1e-5)):
        for ours, right in zip(attention_by_blocks(tensors, True, FULL, dtype), exact, strict=True):
            assert ours.dtype == torch.float32 and right.dtype == torch.float64
            assert low < (ours - right).abs().max() < high


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (3, 2), (4, 5), (32, 32)])
def test_parity_is_tested_in_the_first_and_the_last_pair(batch, heads):
    case = Case("eager", batch, 2, heads, 4)
    numbers = torch.arange(batch * heads).view(batch, 1, heads, 1).expand(batch, 2, heads, 4)
    picked = Reference.pick(case, numbers)
    assert picked.shape == (min(8, batch * heads), 2, 4)
    assert all(len(pair.unique()) == 1 for pair in picked)  # a pair is one sequence and one head
    chosen = picked[:, 0, 0].tolist()
    assert (chosen[0], chosen[-1]) == (0, batch * heads - 1)
    assert chosen == Reference.pick(case, numbers)[:, 0, 0].tolist()
    if batch * heads >= 20:
        assert len(set(chosen)) >= 7  # drawn, not one pair many times


def plain(case, inputs, *, scale=1.0, seen=None, change_kv=lambda k, v: (k, v), change_output=lambda x: x):
    """A backend of our own, right unless told otherwise."""
    q, k, v = inputs[0].unbind(2) if case.layout == "packed" else inputs
    k, v = change_kv(k, v)
    return change_output(textbook(q, k, v, case.causal, case.window, q.dtype, scale, seen))


def mask_of(tokens, left, right):
    return [[i - left <= j <= i + right for j in range(tokens)] for i in range(tokens)]


def spoil(batch, head, value):
    """Add to one number in one (sequence, head) pair of the output: its last token's last element."""

    def change_output(x):
        delta = torch.zeros_like(x)
        delta[batch, -1, head, -1] = value
        return x + delta

    return change_output


WRONG = {  # name: (what is wrong, the tensors that must be named)
    "a key too many": ({"seen": mask_of(16, 16, 1)}, TENSORS),
    "a key too few": ({"seen": mask_of(16, 14, 0)}, ("output",)),
    "no mask": ({"seen": mask_of(16, 16, 16)}, TENSORS),
    "scale": ({"scale": 1.3}, ("output", "dq", "dk")),
    "scale 1": ({"scale": 8**0.5}, ("output", "dq", "dk", "dv")),
    "no gradient of k": ({"change_kv": lambda k, v: (k.detach() + 0 * k, v)}, ("dk",)),
    "gradient of k turned": ({"change_kv": lambda k, v: (2 * k.detach() - k, v)}, ("dk",)),
    "gradient of v doubled": ({"change_kv": lambda k, v: (k, 2 * v - v.detach())}, ("dv",)),
    "NaN in the first pair": ({"change_output": spoil(0, 0, float("nan"))}, ("output",)),
    "NaN in the last pair": ({"change_output": spoil(-1, -1, float("nan"))}, ("output",)),
    "infinity in the last pair": ({"change_output": spoil(-1, -1, float("inf"))}, ("output",)),
    "one number of the first pair": ({"change_output": spoil(0, 0, 0.2)}, ("output",)),
    "one number of the last pair": ({"change_output": spoil(-1, -1, -0.2)}, ("output",)),
}


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("batch", [2, 5])  # 6 pairs: all are tested; 15: eight of them
def test_our_own_backend_is_right(monkeypatch, layout, batch):
    monkeypatch.setattr(attention_measure, "forward", plain)
    measurement = on_cpu(change(SMALL, layout=layout, batch_size=batch))
    assert (measurement.status, measurement.reason) == ("ok", "")
    assert all(error <= limit for error, limit in measurement.errors.values())
    assert tuple(measurement.errors) == TENSORS and len(measurement.rounds) == 1


@pytest.mark.parametrize("layout", ["separate", "packed"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_an_error_without_a_time(monkeypatch, name, layout):
    wrong, tensors = WRONG[name]
    monkeypatch.setattr(attention_measure, "forward", lambda case, inputs: plain(case, inputs, **wrong))
    measurement = on_cpu(change(SMALL, batch_size=5, layout=layout))
    assert measurement.status == "error" and measurement.reason.startswith("parity: ")
    assert not measurement.rounds and not measurement.host_ms
    assert not measurement.peak_bytes and not measurement.peak_above_inputs_bytes
    beyond = {name for name, (error, limit) in measurement.errors.items() if not error <= limit}
    assert set(tensors) <= beyond
    assert all((f"{tensor} " in measurement.reason) == (tensor in beyond) for tensor in ("output", "dq", "dk", "dv"))
    if "gradient" in name:
        assert beyond == set(tensors)  # and nothing else
    if "NaN" in name or "infinity" in name:
        assert measurement.errors["output"][0] == math.inf


@pytest.mark.parametrize("window", [(4, 0), (6, 0)])
def test_a_window_off_by_one_is_an_error(monkeypatch, window):
    def off(case, inputs):
        return plain(case, inputs, seen=mask_of(16, 5, 0))

    monkeypatch.setattr(attention_measure, "forward", off)
    reference = Reference()
    assert on_cpu(change(SMALL, window=window), reference=reference).reason.startswith("parity: output")
    assert on_cpu(change(SMALL, window=(5, 0)), reference=reference).status == "ok"
    assert on_cpu(change(SMALL, causal=False), reference=reference).reason.startswith("parity: output")


@pytest.mark.parametrize(("dtype", "roundings"), [("bf16", 1), ("fp16", 1), ("fp32", 16)])
def test_the_allowed_error_is_twice_that_of_plain_pytorch_and_a_rounding(dtype, roundings):
    case = Case("eager", 2, 24, 2, 8, dtype=dtype)
    inputs, upstream = make_inputs(case, CPU)

    def result(kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        output = textbook(*leaves, True, FULL, kind)
        return [x.double() for x in gradients_of(output, leaves, upstream.to(kind))]

    exact, allowed = Reference().get(case, inputs, upstream)
    right, rough = result(torch.float64), result(DTYPES[case.dtype])
    eps = torch.finfo(DTYPES[dtype]).eps
    for ours, limit, precise, plain_ in zip(exact, allowed, right, rough, strict=True):
        precise, plain_ = Reference.pick(case, precise), Reference.pick(case, plain_)
        torch.testing.assert_close(ours.double(), precise, rtol=1e-4, atol=1e-5)
        rounding = roundings * eps * max(1.0, precise.abs().max().item())
        error = (plain_ - precise).abs().max().item()
        assert error > rounding / (8 * roundings)  # both parts count
        assert limit == pytest.approx(2 * error + rounding, rel=0.2)


def test_the_largest_error_is_held_against_its_own_limit():
    case = Case("eager", 1, 4, 1, 2, dtype="bf16")
    inputs, upstream = make_inputs(case, CPU)
    reference = Reference()
    exact, allowed = reference.get(case, inputs, upstream)
    results = [x.view(1, 4, 1, 2) + 0.5 * limit for x, limit in zip(exact, allowed, strict=True)]
    results[2][0, 1, 0, 1] += 1.0
    errors = reference.compare(case, results, inputs, upstream)
    for name, limit in zip(TENSORS, allowed, strict=True):
        error = 0.5 * limit + (name == "dk")
        assert errors[name] == (pytest.approx(error, rel=1e-3), limit)


def test_a_shape_has_one_reference_for_all_backends_and_layouts(monkeypatch):
    made = []
    by_blocks = attention_measure.attention_by_blocks
    monkeypatch.setattr(attention_measure, "attention_by_blocks", lambda *x: made.append(x[3]) or by_blocks(*x))
    reference = Reference()
    for backend, layout in itertools.product(("eager", "sdpa", "sdpa_flash"), ("separate", "packed")):
        assert on_cpu(change(SMALL, backend=backend, layout=layout), reference=reference).status == "ok"
    assert made == [torch.float32, torch.bfloat16]
    others = [{"batch_size": 1}, {"context_length": 17}, {"num_heads": 2}, {"head_dim": 9}, {"causal": False}]
    others += [{"window": (3, 0)}, {"dtype": "fp32"}]
    for number, changes in enumerate(others, 2):
        on_cpu(change(SMALL, **changes), reference=reference)
        assert len(made) == 2 * number, changes
    assert made[-2:] == [torch.float64, torch.float32]  # fp32 is held against fp64


def test_right_kernels_in_fp32_pass():
    """A fused kernel takes a score's gradient as a difference of two sums: some roundings more than plain PyTorch."""
    shapes = [(2, 64, 3, 8, True), (1, 128, 4, 32, False), (2, 128, 4, 32, False)]
    cases = [Case("sdpa_flash", *shape, dtype="fp32") for shape in shapes]
    assert [on_cpu(case).reason for case in cases] == [""] * 3


# ----------------------------------------------------------------------------------------------------------- statuses


def test_a_case_that_runs():
    measurement = on_cpu(change(SMALL, backend="sdpa_flash"))
    assert (measurement.status, measurement.reason) == ("ok", "")
    assert measurement.chosen_backend == "sdpa_flash"
    assert measurement.operator == "aten._scaled_dot_product_flash_attention_for_cpu"
    assert measurement.kernels == {"forward": "", "backward": ""} and measurement.clock_mhz == []  # no GPU
    assert len(measurement.rounds) == len(measurement.host_ms) == 1
    assert tuple(measurement.rounds[0]) == DIRECTIONS
    assert on_cpu(SMALL).operator.startswith("eager")


def test_auto_says_what_it_took_and_why():
    measurement = on_cpu(change(SMALL, backend="auto"))
    assert (measurement.status, measurement.chosen_backend) == ("ok", "sdpa")
    assert "without a GPU" in measurement.reason
    measurement = on_cpu(change(SMALL, backend="auto", window=(4, 0)))
    assert (measurement.status, measurement.chosen_backend) == ("ok", "eager")
    assert "the only one with a window" in measurement.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backend": "sdpa_cudnn"}, "needs an NVIDIA GPU"),
        ({"backend": "flash_attn", "layout": "packed"}, "needs an NVIDIA GPU"),
        ({"backend": "sdpa", "window": (3, 0)}, "no window"),
        ({"backend": "flex"}, "no backward pass"),
    ],
)
def test_a_kernel_that_cannot_run_is_unsupported(monkeypatch, changes, reason):
    monkeypatch.setattr(attention_measure, "forward", lambda *_: pytest.fail("it was called all the same"))
    measurement = on_cpu(change(SMALL, **changes))
    assert measurement.status == "unsupported" and reason in measurement.reason
    assert not measurement.rounds and not measurement.errors and not measurement.peak_bytes


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (SettingsError("flash_attn has no such mask"), "unsupported", "flash_attn has no such mask"),
        (
            RuntimeError("CUDA error: invalid\n configuration"),
            "error",
            "RuntimeError: CUDA error: invalid configuration",
        ),
        (ValueError("head_dim"), "error", "ValueError: head_dim"),
        (TypeError("an argument"), "error", "TypeError: an argument"),
        (NotImplementedError("bf16"), "error", "NotImplementedError: bf16"),
        (torch.OutOfMemoryError("full"), "oom", "OutOfMemoryError: full"),
        (MemoryError("full"), "oom", "MemoryError: full"),
        (RuntimeError("CUDA error: out of memory"), "oom", "RuntimeError: CUDA error: out of memory"),
        (RuntimeError("x" * 1000), "error", ("RuntimeError: " + "x" * 1000)[:300]),
    ],
)
@pytest.mark.parametrize("call", [1, 2, 3])  # in the parity check, in the memory pass, in the timed part
def test_what_goes_wrong_is_a_status_with_its_reason(monkeypatch, call, error, status, reason):
    calls = []

    def fail(case, inputs):
        calls.append(case)
        if len(calls) == call:
            raise error
        return plain(case, inputs)

    monkeypatch.setattr(attention_measure, "forward", fail)
    measurement = on_cpu(SMALL)
    assert (measurement.status, measurement.reason) == (status, reason)
    assert len(calls) == call and not measurement.rounds
    assert bool(measurement.errors) == (call > 1) and bool(measurement.peak_bytes) == (call > 2)
    again = on_cpu(SMALL, earlier=measurement)  # the next round
    assert again is measurement and len(calls) == call and not again.rounds
    assert (again.status, again.reason) == (status, reason)


def test_a_stop_is_no_failure_of_the_case(monkeypatch):
    def stop(case, inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention_measure, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        on_cpu(SMALL)


def test_later_rounds_add_times_and_nothing_else(monkeypatch):
    reference = Reference()
    first = on_cpu(SMALL, reference=reference)
    errors, peaks = dict(first.errors), dict(first.peak_bytes)
    monkeypatch.setattr(attention_measure, "_examine", lambda *_: pytest.fail("parity and memory a second time"))
    second = on_cpu(SMALL, reference=reference, earlier=first)
    third = on_cpu(SMALL, reference=reference, earlier=second)
    assert third is first and len(first.rounds) == len(first.host_ms) == 3
    assert (first.status, first.errors, first.peak_bytes) == ("ok", errors, peaks)


def test_out_of_memory_in_a_later_round_keeps_what_was_measured(monkeypatch):
    measurement = on_cpu(SMALL)
    times = [dict(one) for one in measurement.rounds]

    def full(case, inputs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(attention_measure, "forward", full)
    on_cpu(SMALL, earlier=measurement)
    assert measurement.status == "oom" and measurement.rounds == times


def test_nothing_of_a_case_out_of_memory_is_kept(monkeypatch):
    """The error's traceback holds the frames and so the tensors; the next, smaller case would fail too."""
    held = []

    def full(case, inputs):
        scores = torch.ones(1000)
        held.extend(weakref.ref(x) for x in (scores, *inputs))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(attention_measure, "forward", full)
    gc.disable()
    try:
        measurement = on_cpu(SMALL)
        assert [reference() for reference in held] == [None] * 4
    finally:
        gc.enable()
    assert (measurement.status, measurement.reason) == ("oom", "OutOfMemoryError: full")


def test_the_masks_of_the_case_before_are_dropped():
    attend(*make_inputs(SMALL, CPU)[0], backend="eager")
    assert score_bias.cache_info().currsize > 0
    clean(CPU)
    assert score_bias.cache_info().currsize == 0


def test_a_cached_mask_counts_as_memory_in_every_case(monkeypatch):
    """The parity check fills the cache; the mask it left must not be missing from the peak."""
    case = change(SMALL, dtype="fp32", context_length=32)
    peaks = [on_cpu(case).peak_above_inputs_bytes for _ in range(2)]
    assert peaks[0] == peaks[1]
    without = on_cpu(change(case, causal=False)).peak_above_inputs_bytes
    assert {name: peaks[0][name] - without[name] for name in without} == dict.fromkeys(without, 4 * 32 * 32)


# ------------------------------------------------------------------------------------------------------------- memory

LAYOUTS_AND_BACKENDS = list(itertools.product(("separate", "packed"), ("eager", "sdpa_flash")))


@pytest.mark.parametrize(("layout", "backend"), LAYOUTS_AND_BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_inputs_are_the_difference_of_the_two_peaks(layout, backend, dtype):
    case = Case(backend, 2, 32, 2, 8, layout=layout, dtype=dtype)
    measurement = on_cpu(case)
    assert case.inputs_bytes == 4 * 2 * 32 * 2 * 8 * {"fp32": 4, "bf16": 2}[dtype]
    for direction in ("forward", "forward_backward"):
        above = measurement.peak_above_inputs_bytes[direction]
        assert measurement.peak_bytes[direction] - above == case.inputs_bytes and above > 0
    assert set(measurement.peak_bytes) == set(measurement.peak_above_inputs_bytes) == {"forward", "forward_backward"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_peak_of_the_fused_kernel_by_hand(monkeypatch, layout, dtype):
    """Forward: output and a log-sum-exp; backward: three gradients, and packed the tensor that joins them."""
    monkeypatch.setattr(Reference, "compare", lambda *_: {})  # not a test of parity
    size = {"fp32": 4, "bf16": 2}[dtype]
    for tokens in (64, 128):
        elements, queries = 3 * tokens * 2 * 8, 3 * tokens * 2
        above = on_cpu(Case("sdpa_flash", 3, tokens, 2, 8, layout=layout, dtype=dtype)).peak_above_inputs_bytes
        assert above["forward"] == size * elements + 4 * queries
        if layout == "separate":
            assert above["forward_backward"] == size * 4 * elements + 4 * queries
        else:  # when the gradients are joined the log-sum-exp is gone
            assert above["forward_backward"] == size * 7 * elements


def test_growth_with_the_context(monkeypatch):
    """At a fixed batch twice the context is 4 times the memory of textbook attention and twice that of a fused one."""
    monkeypatch.setattr(Reference, "compare", lambda *_: {})
    for backend, low, high in (("eager", 3.8, 4.0), ("sdpa_flash", 2.0, 2.0)):
        short, long = (
            on_cpu(Case(backend, 1, tokens, 2, 4, causal=False, dtype="fp32")).peak_above_inputs_bytes
            for tokens in (128, 256)
        )
        for direction in ("forward", "forward_backward"):
            assert low <= long[direction] / short[direction] <= high, (backend, direction)


def test_the_peak_of_forward_is_that_of_forward_alone(monkeypatch):
    """A backward pass that needs more must not show in the forward number."""

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            torch.ones(1000, dtype=torch.uint8)
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            torch.ones(50_000, dtype=torch.uint8)
            return upstream.clone()

    monkeypatch.setattr(attention_measure, "forward", lambda case, inputs: Greedy.apply(inputs[0]))
    case = Case("eager", 1, 2, 1, 4, layout="packed", dtype="fp32")
    inputs, upstream = make_inputs(case, CPU)
    upstream = torch.ones_like(inputs[0])
    total, above = measure_memory(case, CPU, inputs, upstream, 0, None)
    size = 4 * 3 * 8  # bytes of qkv, and of its gradient and of the output, which is alive while the gradient is made
    assert above == {"forward": 1000, "forward_backward": size + 50_000}
    assert {name: total[name] - above[name] for name in total} == dict.fromkeys(total, 2 * size)


def test_a_budget_is_met_to_the_byte():
    case = change(SMALL, dtype="fp32")
    peak = on_cpu(case).peak_bytes["forward_backward"]
    assert on_cpu(case, limit_bytes=peak).status == "ok"
    measurement = on_cpu(case, limit_bytes=peak - 1)
    assert measurement.status == "oom" and "memory budget" in measurement.reason
    assert not measurement.rounds and not measurement.peak_bytes
    assert measurement.errors  # parity was looked at, without the budget
    assert on_cpu(change(case, batch_size=1), limit_bytes=peak - 1).status == "ok"  # the next, smaller one runs


# --------------------------------------------------------------------------------------------------------------- time


class Clock:
    """A clock that stands still unless it is told to run."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(attention_measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def timer(self, forward_s: float, backward_s: float) -> Timer:
        clock, self.calls = self, 0

        class Work(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                clock.now += forward_s
                clock.calls += 1
                return x.clone()

            @staticmethod
            def backward(ctx, upstream):
                clock.now += backward_s
                return upstream

        x = torch.ones(2, requires_grad=True)
        return Timer(CPU, lambda: Work.apply(x), [x], torch.ones(2))


def test_times_of_a_known_clock(monkeypatch):
    clock = Clock(monkeypatch)
    times, host_ms, mhz = clock.timer(0.25, 0.5).measure(seconds=9.0, warm_up_seconds=0.0)
    assert times == {"forward": [250.0] * 12, "backward": [500.0] * 12, "forward_backward": [750.0] * 12}
    assert (host_ms, mhz) == (750.0, None)
    assert clock.calls == 2 + 12


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.0, 5), (1.0, 5), (4.4, 5), (6.0, 6), (24.9, 24), (25.0, 25), (1e6, 25)]
)
def test_between_5_and_25_repetitions(monkeypatch, seconds, count):
    times, _, _ = Clock(monkeypatch).timer(0.5, 0.5).measure(seconds, warm_up_seconds=0.0)
    assert [len(values) for values in times.values()] == [count] * 3


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 2), (1.0, 2), (1.5, 3), (20.0, 21)])
def test_warm_up(monkeypatch, seconds, calls):
    clock = Clock(monkeypatch)
    assert clock.timer(0.25, 0.75).warm_up(seconds) == 1000.0
    assert clock.calls == calls


class FakeEvent:
    """A CUDA event of a GPU on which every interval takes half a millisecond; `caught_up` answers query, in turn."""

    made: ClassVar[list] = []
    caught_up: ClassVar[list] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.place = len(self.made)
        self.made.append(self)

    def query(self):
        return self.caught_up.pop(0)

    def elapsed_time(self, other):
        return 0.5 * (other.place - self.place)


@pytest.mark.parametrize(
    ("caught_up", "attempts"), [([False], 1), ([True, False], 2), ([True, True, False], 3), ([True] * 9, 3)]
)
def test_a_gpu_that_caught_up_with_the_host_gets_a_longer_start(monkeypatch, caught_up, attempts):
    sleeps = []
    monkeypatch.setattr(FakeEvent, "made", [])
    monkeypatch.setattr(FakeEvent, "caught_up", list(caught_up))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", sleeps.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    launch = 1 / 4096  # seconds of the host
    timer = Clock(monkeypatch).timer(launch, launch)
    timer.device, timer.cuda = CUDA, True
    times, host_ms, mhz = timer.measure(seconds=10.5 * 2 * launch, warm_up_seconds=0.0)
    assert times == {"forward": [0.5] * 10, "backward": [0.5] * 10, "forward_backward": [1.0] * 10}
    assert host_ms == 2000 * launch and mhz == technique_bench.SPIN_CYCLES / 0.5 / 1000
    starts = [cycles / 2e6 for cycles in sleeps[:-1]]  # milliseconds at 2 GHz
    assert sleeps[-1] == technique_bench.SPIN_CYCLES and len(starts) == attempts
    assert starts[0] == pytest.approx(2 * 10 * host_ms, rel=1e-3)  # twice what the host needs
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(starts))
    assert len(caught_up) - len(FakeEvent.caught_up) == min(attempts, len(caught_up))


def test_real_repetitions_add_up():
    measurement = on_cpu(SMALL)
    times = measurement.rounds[0]
    assert 5 <= len(times["forward"]) <= 25
    for forward_ms, backward_ms, both in zip(*(times[direction] for direction in DIRECTIONS), strict=True):
        assert min(forward_ms, backward_ms) > 0 and forward_ms + backward_ms == pytest.approx(both)


def test_the_timer_gets_its_seconds_and_runs_the_case(monkeypatch):
    seen = []
    warm_up, timed = Timer.warm_up, Timer.measure
    monkeypatch.setattr(Timer, "warm_up", lambda self, s: seen.append(("warm_up", s)) or warm_up(self, 0.0))
    monkeypatch.setattr(Timer, "measure", lambda self, s, w: seen.append(("timed", s)) or timed(self, s, w))
    Bench(CPU, "bf16", rounds=1, seconds=0.0125).measure(SMALL)
    assert seen == [("timed", 0.0125), ("warm_up", 0.025)]


# -------------------------------------------------------------------------------------------------------- many cases


def test_every_round_measures_every_case_in_another_order(monkeypatch):
    calls, seen = [], []

    def fake(case, device, reference, *, seconds, warm_up_seconds, earlier, limit_bytes):
        assert (device, seconds, warm_up_seconds, limit_bytes) == (CPU, 0.5, 1.0, 123)
        calls.append(case)
        measurement = earlier or Measurement(case)
        assert (earlier is None) == (calls.count(case) == 1) and measurement.case == case
        measurement.rounds.append({direction: [1.0] for direction in DIRECTIONS})
        return measurement

    monkeypatch.setattr(attention_measure, "measure", fake)
    cases = [change(SMALL, batch_size=size) for size in range(1, 13)]

    def orders(seed):
        calls.clear()
        bench = Bench(CPU, "bf16", rounds=4, seconds=0.5, seed=seed, limit_bytes=123)
        bench.measure_all(cases, lambda known: seen.append([(m.case, len(m.rounds)) for m in known]))
        return [[case.batch_size for case in calls[i : i + 12]] for i in range(0, 48, 12)]

    first = orders(0)
    assert [sorted(order) for order in first] == [list(range(1, 13))] * 4
    assert len({tuple(order) for order in first}) == 4 and list(range(1, 13)) not in first
    assert seen == [[(case, number) for case in cases] for number in (1, 2, 3, 4)]  # always in the order of the cases
    assert orders(0) == first != orders(1)


def test_cases_that_differ_from_themselves_get_more_rounds(monkeypatch):
    """Up to twice as many, and only those cases; a case that failed gets none."""
    times = {1: [10.0] * 9, 2: [10.0, 11.0] * 4, 3: ["oom"], 4: [10.0, 10.1, 10.2, 10.1, 10.0, 10.0]}  # 4: 2 % apart
    times |= {5: [10.0, 10.1] * 3}  # 1 %
    calls, seen = [], []

    def fake(case, *_, earlier, **options):
        calls.append(case.batch_size)
        measurement = earlier or Measurement(case)
        if measurement.status == "ok":
            ms = times[case.batch_size][len(measurement.rounds)]
            if ms == "oom":
                measurement.status = ms
            else:
                measurement.rounds.append(rounds_of([ms]).rounds[0])
        return measurement

    monkeypatch.setattr(attention_measure, "measure", fake)
    cases = [change(SMALL, batch_size=size) for size in times]
    Bench(CPU, "bf16", rounds=3, seconds=0.5).measure_all(cases, lambda known: seen.append(len(known)))
    assert sorted(calls[:15]) == sorted([1, 2, 3, 4, 5] * 3)
    assert [sorted(calls[i : i + 2]) for i in (15, 17, 19)] == [[2, 4]] * 3 and len(calls) == 21
    assert seen == [5] * 6  # all cases, after each round
    calls.clear()
    seen.clear()
    Bench(CPU, "bf16", rounds=1, seconds=0.5).measure_all(cases, lambda known: seen.append(len(known)))
    assert sorted(calls) == [1, 2, 3, 4, 5] and seen == [5]  # one round tells nothing about noise


@pytest.mark.parametrize(
    ("ms", "unsettled"), [((10.0, 10.14), False), ((10.0, 10.16), True), ((10.0,), False), ((), False)]
)
def test_when_a_case_is_unsettled(ms, unsettled):
    assert is_unsettled(rounds_of(*([x] for x in ms))) is unsettled
    assert is_unsettled(rounds_of(*([x] for x in reversed(ms)), [10.1])) is unsettled


def test_differences_between_rounds_by_hand():
    measurement = rounds_of([9.0, 10.0, 50.0], [11.0, 11.0], [12.0])  # medians 10, 11, 12
    assert round_differences(measurement, "forward_backward") == pytest.approx([0.1, 0.2, 1 / 11])
    assert round_differences(rounds_of([12.0], [10.0]), "forward_backward") == pytest.approx([0.2])  # over the smaller
    measurement.rounds[0]["forward"] = [1.0]
    measurement.rounds[1]["forward"] = measurement.rounds[2]["forward"] = [2.0]
    assert round_differences(measurement, "forward") == [1.0, 1.0, 0.0]
    assert round_differences(rounds_of([5.0, 6.0]), "forward_backward") == []
    assert round_differences(Measurement(SMALL, status="oom"), "forward_backward") == []


def test_noise_of_a_case_by_hand():
    """The median over all pairs of rounds."""
    assert case_noise([10.0, 11.0, 12.0]) == pytest.approx(0.1)
    assert case_noise([12.0, 10.0]) == pytest.approx(0.2)
    assert case_noise([10.0, 10.0, 10.0, 20.0]) == pytest.approx(0.5)  # 3 pairs of 0, 3 of 1
    assert case_noise([10.0]) is None and case_noise([]) is None


def test_noise_floor_by_hand():
    """The 95th percentile of the noise of the cases, by linear interpolation."""
    assert noise_floor([[10.0, 11.0], [13.0, 10.0]]) == pytest.approx(0.1 + 0.95 * 0.2)
    many = [[100.0, 100.0 + i] for i in range(21)]
    random.Random(0).shuffle(many)
    assert noise_floor([*many, [5.0], []]) == pytest.approx(0.19)  # a case with one round tells nothing
    assert noise_floor([[10.0]]) is None and noise_floor([]) is None


def test_median_is_over_all_repetitions():
    assert median(rounds_of([1.0, 2.0, 3.0], [100.0]), "forward_backward") == 2.5
    assert median(rounds_of([1.0, 2.0, 3.0], [100.0]), "backward") == 0.75 * 2.5


# ------------------------------------------------------------------------------------------------------------ on a GPU


def peak_on_gpu(case: Case) -> dict[str, int]:
    """Peak bytes over what was allocated before the inputs were made; skips what this GPU cannot run."""
    reason = unsupported_reason(
        case.backend,
        CUDA,
        DTYPES[case.dtype],
        case.window,
        case.head_dim,
        causal=case.causal,
        tokens=case.context_length,
    )
    if reason is not None:
        pytest.skip(reason)
    clean(CUDA)
    for dtype in (torch.bfloat16, torch.float32):  # cuBLAS's workspace of the thread that runs the backward pass
        x = torch.ones(16, 16, device=CUDA, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()
    del x
    held = torch.cuda.memory_allocated()
    inputs, upstream = make_inputs(case, CUDA)
    message = ""
    try:
        total, above = measure_memory(case, CUDA, inputs, upstream, held, None)
    except RuntimeError as error:
        if "head dim" not in str(error).lower():
            raise
        message = str(error)
    if message:
        pytest.skip(f"the kernel itself refuses a head this wide: {message}")
    assert {total[name] - above[name] for name in total} == {case.inputs_bytes}
    del inputs, upstream
    clean(CUDA)
    assert torch.cuda.memory_allocated() == held
    return total


PUBLISHED = [  # batch, context, heads, embedding width, MiB
    (16, 1024, 32, 2048, 644.00048828125),
    (32, 1024, 32, 2048, 1288.00048828125),
    (64, 1024, 32, 2048, 2576.00048828125),
    (32, 512, 32, 2048, 644.00048828125),
    (32, 2048, 32, 2048, 2576.00048828125),
    (32, 1024, 8, 2048, 1282.00048828125),
    (32, 1024, 16, 2048, 1284.00048828125),
    (32, 1024, 16, 1024, 644.00048828125),
    (32, 1024, 16, 4096, 2564.00048828125),
]


@pytest.mark.parametrize(("batch", "tokens", "heads", "width", "mib"), PUBLISHED)
def test_the_published_peaks_follow_from_a_formula(batch, tokens, heads, width, mib):
    """20 bytes an element of one input: qkv 6, its gradient 6, output and its gradient 4, dq in fp32 4."""
    assert 20 * batch * tokens * width + 8 * batch * heads * tokens + 512 == mib * MIB


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width", "mib"), PUBLISHED)
def test_gpu_peak_of_flash_attn_is_the_published_one_to_the_byte(batch, tokens, heads, width, mib, causal):
    case = Case("flash_attn", batch, tokens, heads, width // heads, causal=causal, layout="packed", dtype="bf16")
    assert peak_on_gpu(case)["forward_backward"] == mib * MIB


@pytest.mark.gpu
@pytest.mark.parametrize("window", [(64, 0), (256, 0)])
def test_gpu_a_window_saves_no_memory(window):
    case = Case("flash_attn", 16, 1024, 32, 64, causal=True, layout="packed", dtype="bf16")
    assert peak_on_gpu(change(case, window=window)) == peak_on_gpu(case)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_eager_needs_at_least_5_times_as_much(causal):
    fused = Case("flash_attn", 16, 1024, 32, 64, causal=causal, layout="packed", dtype="bf16")
    eager = peak_on_gpu(change(fused, backend="eager"))
    assert eager["forward_backward"] >= 5 * peak_on_gpu(fused)["forward_backward"]


@pytest.mark.gpu
def test_gpu_measure_finds_the_same_peak():
    """Through parity, with its references and masks before it."""
    case = Case("flash_attn", 16, 1024, 32, 64, causal=True, layout="packed", dtype="bf16")
    expected = peak_on_gpu(case)
    measurement = measure(case, CUDA, Reference(), **QUICK)
    assert (measurement.status, measurement.reason) == ("ok", "")
    assert measurement.peak_bytes == expected


@pytest.mark.gpu
@pytest.mark.parametrize("window", [FULL, (64, 0)])
@pytest.mark.parametrize("backend", ["eager", "sdpa_math", "sdpa_flash", "sdpa_cudnn", "flash_attn", "varlen", "flex"])
def test_gpu_the_inputs_are_the_difference_of_the_two_peaks(backend, window):
    """Masks and the like that the parity check left in a cache count as memory of the case, not as its inputs."""
    reason = unsupported_reason(backend, CUDA, torch.bfloat16, window, 64, tokens=512)
    if reason is not None:
        pytest.skip(reason)
    case = Case(backend, 2, 512, 4, 64, window=window, dtype="bf16")
    measurement = measure(case, CUDA, Reference(), **QUICK)
    assert (measurement.status, measurement.reason) == ("ok", "")
    kept = 8192 if backend == "flex" else 0  # its block mask of a few KiB stays in its cache, see `clean`
    for direction, peak in measurement.peak_bytes.items():
        assert 0 <= peak - measurement.peak_above_inputs_bytes[direction] - case.inputs_bytes <= kept


FIRST_AND_SECOND = """
import torch
from attention_measure import Case, Reference, measure

for _ in range(2):
    case = Case("eager", 4, 256, 4, 64, layout="packed", dtype="bf16")
    measurement = measure(case, torch.device("cuda"), Reference(), seconds=0.001, warm_up_seconds=0.001)
    print(measurement.peak_bytes["forward_backward"], measurement.peak_above_inputs_bytes["forward_backward"])
"""


@pytest.mark.gpu
def test_gpu_no_case_pays_for_having_been_the_first():
    """In a process of its own: libraries take their workspaces when they are used for the first time."""
    command = [sys.executable, "-c", FIRST_AND_SECOND]
    folder = Path(attention_measure.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert int(first.split()[0]) - int(first.split()[1]) == 4 * 4 * 256 * 4 * 64 * 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "sign"), [("flash_attn", "flash"), ("sdpa_flash", "flash"), ("sdpa_cudnn", "cudnn")]
)
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_gpu_kernels_clock_and_times(backend, sign, layout):
    case = Case(backend, 4, 1024, 16, 64, layout=layout, dtype="bf16")
    reason = unsupported_reason(backend, CUDA, torch.bfloat16, head_dim=64, tokens=1024)
    if reason is not None:
        pytest.skip(reason)
    reference = Reference()
    measurement = measure(case, CUDA, reference, **QUICK)
    assert (measurement.status, measurement.reason) == ("ok", "")
    assert sign in measurement.kernels["forward"].lower()
    assert sign in measurement.kernels["backward"].lower()
    assert "<" not in measurement.kernels["forward"] + measurement.kernels["backward"]
    measurement = measure(case, CUDA, reference, **QUICK, earlier=measurement)
    assert len(measurement.rounds) == len(measurement.clock_mhz) == len(measurement.host_ms) == 2
    assert all(200 < mhz < 3000 for mhz in measurement.clock_mhz)
    for times in measurement.rounds:
        assert 5 <= len(times["forward"]) <= 25
        for forward_ms, backward_ms, both in zip(*(times[direction] for direction in DIRECTIONS), strict=True):
            assert forward_ms + backward_ms == pytest.approx(both, abs=0.01)


@pytest.mark.gpu
def test_gpu_out_of_memory_leaves_nothing_behind():
    clean(CUDA)
    before = torch.cuda.memory_allocated()
    reference = Reference()
    measurement = measure(Case("eager", 64, 16384, 32, 64, dtype="bf16"), CUDA, reference, **QUICK)
    assert measurement.status == "oom" and "out of memory" in measurement.reason.lower()
    assert torch.cuda.memory_allocated() == before
    assert not measurement.rounds and not measurement.peak_bytes and not reference.known
    small = measure(Case("eager", 2, 128, 4, 64, dtype="bf16"), CUDA, reference, **QUICK)  # the next, smaller one runs
    assert small.status == "ok"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["separate", "packed"])
def test_gpu_a_wrong_backend_is_an_error(monkeypatch, layout):
    def off_by_one(case, inputs):
        window = (case.window[0] - 1, 0)
        run = packed_attention if layout == "packed" else attend
        return run(*inputs, backend=case.backend, causal=True, window=window)

    case = Case("eager", 5, 256, 4, 64, window=(64, 0), layout=layout, dtype="bf16")
    assert measure(case, CUDA, Reference(), **QUICK).status == "ok"
    monkeypatch.setattr(attention_measure, "forward", off_by_one)
    measurement = measure(case, CUDA, Reference(), **QUICK)
    assert measurement.status == "error" and measurement.reason.startswith("parity: output") and not measurement.rounds
