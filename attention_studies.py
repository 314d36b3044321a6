"""Two questions that a table of cases does not answer: from which context on does it pay, and what does the seam cost.

    python attention_benchmark.py --sweep break_even     runs the first
    python attention_benchmark.py --sweep overhead       runs the second

**Break-even.** On a grid of contexts at a fixed number of tokens, then by bisection: from which context on is a fused
kernel faster than eager, and a kernel with a window faster than the same kernel, and than cuDNN, without. The batch is
tokens // context, so between powers of two the tokens are a little fewer, for both sides alike. The rounds of a case
follow one another; a difference counts if it is larger than that between any two rounds of either case.

**Overhead.** Every model calls `attention.py`; here its forward and backward stand beside the same kernel called as its
own documentation does, block by block in turn, with the host's time in it.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from attention import DTYPES
from attention_measure import (
    Bench,
    Case,
    Measurement,
    Timer,
    cell_name,
    clean,
    forward,
    make_inputs,
    median,
    round_differences,
)
from attention_support import SDPA_KERNELS, unsupported_reason
from technique_bench import find_break_even
from utils import percentile

BLOCK, BLOCKS = 5, 70  # repetitions in a block of the overhead study, and blocks of each variant and round


def reason_against(bench: Bench, case: Case) -> str | None:
    """Why a case cannot train here; None if it can."""
    if case.backend == "auto":
        return None
    return unsupported_reason(
        case.backend, bench.device, DTYPES[bench.dtype], case.window, case.head_dim, causal=case.causal
    )


class CaseFailed(Exception):
    """A case of the bisection neither ran nor ran out of memory; holds its measurement."""


# --------------------------------------------------------------------------------------------------------------------
# Break-even contexts
# --------------------------------------------------------------------------------------------------------------------


def break_even(
    bench: Bench,
    base: Case,
    contexts: list[int],
    windows: list[int],
    backends: list[str],
    batch_of: Callable[[int], int],
) -> tuple[list[Measurement], list[dict[str, Any]]]:
    """Bisect for contexts: fused against eager, and a window against the full mask of the same and the fastest kernel.

    Args:
        base: heads, mask, layout and dtype of every case.
        contexts: the grid, rising.
        windows: keys before the query.
        backends: fused kernels to hold against eager.
        batch_of: the batch at a context.

    Returns:
        (all measurements, one answer a question).
    """
    known: dict[Case, Measurement] = {}

    def time_of(case: Case) -> Measurement:
        for _ in range(0 if case in known else bench.rounds):
            known[case] = bench.measure(case, known.get(case))
        return known[case]

    def compare(new: Case, old: Case) -> Callable[[int], bool]:
        def saves(context: int) -> bool:
            at = [replace(case, context_length=context, batch_size=batch_of(context)) for case in (new, old)]
            a, b = (time_of(case) for case in at)
            if b.status == "oom" and a.status == "ok":
                return True
            for measurement in (a, b):
                if measurement.status not in ("ok", "oom"):
                    raise CaseFailed(measurement)
            if a.status == "oom":
                return False
            noise = max([*round_differences(a, "forward_backward"), *round_differences(b, "forward_backward"), 0.0])
            return median(a, "forward_backward") < median(b, "forward_backward") * (1 - min(noise, 0.5))

        return saves

    # Eager is asked up to where its scores still fit in comfort; beyond, fused attention wins anyway.
    questions: list[tuple[str, Case, Case, list[int], int]] = []
    for backend in backends:
        limit = 2048 if bench.device.type == "cuda" else contexts[-1]
        grid = [context for context in contexts if context <= limit]
        question = f"{backend} faster than eager"
        questions.append((question, replace(base, backend=backend), replace(base, backend="eager"), grid, 8))
    windowed = "flash_attn" if reason_against(bench, replace(base, backend="flash_attn")) is None else "varlen"
    full = {windowed: "the same kernel"}
    if reason_against(bench, replace(base, backend="sdpa_cudnn")) is None:
        full["sdpa_cudnn"] = "cuDNN"
    for window in windows:
        grid = [context for context in contexts if context > window + 1 and context >= 128]
        for other, words in full.items():
            if not grid:
                continue
            question = f"{windowed} with window {window} faster than without, {words}"
            new = replace(base, backend=windowed, window=(window, 0), causal=True)
            questions.append((question, new, replace(base, backend=other, causal=True), grid, 128))
    found = []
    for question, new, old, grid, step in tqdm(questions, unit="question", desc="break-even"):
        refused = [reason_against(bench, case) for case in (new, old)]
        refused = [reason for reason in refused if reason is not None]
        if refused or not grid:
            answer = {"low": None, "high": None, "status": "unsupported", "reason": (refused or ["no context fits"])[0]}
        else:
            try:
                low, high = find_break_even(compare(new, old), grid, step)
                answer = {"low": low, "high": high, "status": "ok", "reason": ""}
            except CaseFailed as failed:
                (case,) = failed.args
                answer = {"low": None, "high": None, "status": case.status, "reason": case.reason}
        found.append({"question": question, "backend": new.backend, "window": new.window[0], **answer})
        found[-1] |= {"against": old.backend, "grid": grid, "step": step}
    return list(known.values()), found


def break_even_words(answer: dict[str, Any]) -> str:
    """One answer of `break_even` as a line."""
    low, high = answer["low"], answer["high"]
    words = f"{answer['status']}: {answer['reason']}"
    if answer["status"] == "ok":
        words = f"from {high} on (not yet at {low})" if high is not None else f"never up to {low}"
        words = f"everywhere from {high} on, the smallest tried" if low is None else words
    return f"{answer['question']}: {words}"


# --------------------------------------------------------------------------------------------------------------------
# What the seam costs
# --------------------------------------------------------------------------------------------------------------------


def direct_call(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The kernel called as its own documentation does, without `attention.py`."""
    if case.backend == "flash_attn":
        from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

        kernel = flash_attn_qkvpacked_func if case.layout == "packed" else flash_attn_func
        return kernel(*inputs, causal=case.causal, window_size=case.window)
    q, k, v = inputs[0].unbind(2) if case.layout == "packed" else inputs
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if case.backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)
    with sdpa_kernel(SDPA_KERNELS[case.backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)


def overhead(bench: Bench, cases: list[Case]) -> list[dict[str, Any]]:
    """Wall time of forward and backward through the seam and called directly, block by block in turn.

    Many short blocks, each synchronised, so host and device count; the direct call against itself is the noise.

    Returns:
        One answer a case.
    """
    found = []
    for case in tqdm(cases, unit="case", desc="overhead"):
        known = case.backend in ("flash_attn", "sdpa", *SDPA_KERNELS)
        reason = reason_against(bench, case) if known else "there is no direct call to compare it with"
        if reason is not None:
            found.append(asdict(case) | {"status": "unsupported", "reason": reason})
            continue
        clean(bench.device)
        inputs, upstream = make_inputs(case, bench.device)
        timers = {
            "direct": Timer(bench.device, lambda c=case, i=inputs: direct_call(c, i), inputs, upstream),
            "seam": Timer(bench.device, lambda c=case, i=inputs: forward(c, i), inputs, upstream),
            "direct_again": Timer(bench.device, lambda c=case, i=inputs: direct_call(c, i), inputs, upstream),
        }
        walls: dict[str, list[float]] = {name: [] for name in timers}
        for timer in timers.values():
            timer.warm_up(bench.seconds)
        order = random.Random(bench.seed)
        for _ in range(BLOCKS * bench.rounds):
            for name in order.sample(list(timers), len(timers)):
                timers[name].wait()
                begin = time.perf_counter()
                for _ in range(BLOCK):
                    timers[name].once()
                timers[name].wait()
                walls[name].append(1000 * (time.perf_counter() - begin) / BLOCK)
        direct, seam, again = (percentile(walls[name], 50) for name in timers)
        found.append(
            asdict(case)
            | {
                "status": "ok",
                "blocks": len(walls["direct"]),
                "repetitions_a_block": BLOCK,
                "direct_ms": direct,
                "seam_ms": seam,
            }
            | {"overhead": seam / direct - 1, "noise": abs(again / direct - 1)}
        )
    return found


def overhead_words(answer: dict[str, Any]) -> str:
    """One answer of `overhead` as a line."""
    case = Case(**{field.name: answer[field.name] for field in fields(Case)})
    if answer["status"] != "ok":
        return f"{case.backend:<12}{cell_name(case)}: {answer['status']}: {answer['reason']}"
    return (
        f"{case.backend:<12}{cell_name(case)}: direct {answer['direct_ms']:.4f} ms, through attention.py "
        f"{answer['seam_ms']:.4f} ms, {100 * answer['overhead']:+.2f} % (the direct call against itself: "
        f"{100 * answer['noise']:.2f} %)"
    )
