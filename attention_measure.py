"""Measure one case of attention: parity first, then peak memory, then time of forward, backward and both.

`attention_benchmark.py` runs many of these; `python attention_benchmark.py --help` is the way in. The rules:

- **Parity before time.** Output and the gradients of q, k and v are compared, in eight (sequence, head) pairs, with a
  reference in fp32 (fp64 for fp32 inputs). The error may be twice that of plain PyTorch in the same dtype plus one
  rounding of the largest value; else the case is an `error` and gets no time. Rule: flash-attention's own tests.
- **Memory** is what the tracker of the lab sees in one forward and backward in an otherwise empty allocator, in two
  numbers: everything the case holds (inputs and the gradient of the output too), and what comes on top of the inputs.
- **Time** is the device's: a GPU is first kept busy with a spin kernel while the host queues all repetitions, so that
  gaps between launches do not count as kernel time; a round in which the GPU caught up is queued again with a longer
  start. What the host needs to launch one forward and backward is measured
  beside it; where that is longer than the kernels, an eager model is bound by the host and no kernel helps.
- The spin kernel counts clock cycles, so its time also gives the clock of the GPU right after the measured work, to a
  few percent: a power-limited card shows there. Cases whose rounds differ by more than 1.5 % get more rounds.
- **The kernel that ran** is read from the profiler, after the times were taken.

FLOPs follow flash-attention's benchmarks: forward 4 x batch x heads x context^2 x head_dim, half of it when causal,
backward 2.5 times that; under a window context^2 becomes twice the number of visible pairs of query and key (once, if
not causal). Sources: Dao 2023, arXiv 2307.08691, section 4.1; https://github.com/Dao-AILab/flash-attention
"""

import gc
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from attention import DTYPES, attention, packed_attention
from attention_kernels import observe_kernel, score_bias, sequence_starts, visible_keys
from attention_support import FULL, choose_backend, unsupported_reason
from memory_tracker import MemoryTracker
from technique_bench import gpu_clock_mhz
from utils import SettingsError, is_out_of_memory, percentile

TENSORS = ("output", "dq", "dk", "dv")
DIRECTIONS = ("forward", "backward", "forward_backward")
PARITY_PAIRS = 8
UNSETTLED = 0.015  # a case whose rounds differ by more than this
MORE_ROUNDS = 1  # is measured for that many times the rounds again
HEAD_STARTS = 3  # tries to queue a round before the GPU catches up with the host


@dataclass(frozen=True)
class Case:
    """One point of a sweep; q, k and v are (batch, context, heads, head_dim)."""

    backend: str
    batch_size: int
    context_length: int
    num_heads: int
    head_dim: int
    causal: bool = True
    window: tuple[int, int] = FULL
    layout: str = "separate"  # three tensors, or `packed`: one (batch, context, 3, heads, head_dim)
    dtype: str = "bf16"

    @property
    def inputs_bytes(self) -> int:
        """q, k, v and the gradient of the output."""
        elements = self.batch_size * self.context_length * self.num_heads * self.head_dim
        return 4 * elements * DTYPES[self.dtype].itemsize


def cell_name(case: Case) -> str:
    """The case without its backend, in words."""
    parts = [f"batch {case.batch_size}, context {case.context_length}, {case.num_heads} heads of {case.head_dim}"]
    parts.append("causal" if case.causal else "not causal")
    if tuple(case.window) != FULL:
        parts.append(f"window {case.window[0]}")
    return ", ".join([*parts, case.layout, case.dtype])


@dataclass
class Measurement:
    """What is known of a case. status: ok, oom, unsupported or error; bytes, milliseconds, MHz."""

    case: Case
    status: str = "ok"
    reason: str = ""
    chosen_backend: str = ""
    operator: str = ""
    kernels: dict[str, str] = field(default_factory=dict)  # direction -> longest kernel
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # tensor -> (error, allowed)
    peak_bytes: dict[str, int] = field(default_factory=dict)  # direction -> everything the case holds
    peak_above_inputs_bytes: dict[str, int] = field(default_factory=dict)
    rounds: list[dict[str, list[float]]] = field(default_factory=list)  # direction -> ms of each repetition
    host_ms: list[float] = field(default_factory=list)  # one a round
    clock_mhz: list[float] = field(default_factory=list)  # one a round


# --------------------------------------------------------------------------------------------------------------------
# Work
# --------------------------------------------------------------------------------------------------------------------


def visible_pairs(tokens: int, causal: bool, window: tuple[int, int]) -> int:
    """Pairs of query and key that the mask lets through, counted exactly."""
    left, right = window
    right = 0 if causal else right
    total = 0
    for query in range(tokens):
        first = 0 if left < 0 else max(0, query - left)
        last = tokens - 1 if right < 0 else min(tokens - 1, query + right)
        total += last - first + 1
    return total


def attention_flops(case: Case, direction: str) -> float:
    """Floating-point operations by the standard formula (module docstring)."""
    if case.window == FULL:
        pairs = case.context_length**2 / (2 if case.causal else 1)
    else:
        pairs = visible_pairs(case.context_length, case.causal, case.window)
    forward = 4 * case.batch_size * case.num_heads * case.head_dim * pairs
    return forward * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[direction]


def make_inputs(case: Case, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Normal random inputs, the same for every backend and layout of a shape: [q, k, v] or [qkv], and the upstream."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch_size, case.context_length, case.num_heads, case.head_dim)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype])

    if case.layout == "packed":
        qkv = torch.empty(*shape[:2], 3, *shape[2:], device=device, dtype=DTYPES[case.dtype])
        for part in range(3):
            qkv[:, :, part] = draw()
        return [qkv.requires_grad_()], draw()
    return [draw().requires_grad_() for _ in range(3)], draw()


def forward(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The case through the seam that every model uses: (batch, context, heads, head_dim)."""
    options: dict[str, Any] = {"backend": case.backend, "causal": case.causal, "window": case.window}
    return packed_attention(*inputs, **options) if case.layout == "packed" else attention(*inputs, **options)


# --------------------------------------------------------------------------------------------------------------------
# Parity
# --------------------------------------------------------------------------------------------------------------------


def attention_by_blocks(
    tensors: list[torch.Tensor], causal: bool, window: tuple[int, int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Plain attention and its gradients in `dtype`, one block of queries at a time, so that long contexts fit.

    Args:
        tensors: q, k, v and the gradient of the output, each (pairs, tokens, head_dim).

    Returns:
        Output, dq, dk, dv in fp32 (fp64 if dtype is); gradients of k and v are summed over the blocks in that type.
    """
    q, k, v, upstream = (x.to(dtype) for x in tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs, tokens, head_dim = q.shape
    block = max(1, (2**25 if q.is_cuda else 2**22) // (pairs * tokens))
    output, dq = (torch.empty(q.shape, dtype=wide, device=q.device) for _ in range(2))
    dk, dv = (torch.zeros(q.shape, dtype=wide, device=q.device) for _ in range(2))
    keys = torch.arange(tokens, device=q.device)
    for begin in range(0, tokens, block):
        part = slice(begin, begin + block)
        leaves = [x.detach().requires_grad_() for x in (q[:, part], k, v)]
        scores = leaves[0] @ leaves[1].transpose(1, 2) * head_dim**-0.5  # (pairs, block, tokens)
        if causal or window != FULL:
            hidden = ~visible_keys(keys[part, None], keys[None, :], causal, window)
            scores = scores.masked_fill(hidden, float("-inf"))
        result = scores.softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(result, leaves, upstream[:, part])
        output[:, part], dq[:, part] = result.detach().to(wide), gradients[0].to(wide)
        dk += gradients[1]
        dv += gradients[2]
    return [output, dq, dk, dv]


class Reference:
    """Exact results and allowed errors of a shape, made once and kept on the host for every backend."""

    def __init__(self) -> None:
        self.known: dict[tuple, tuple[list[torch.Tensor], list[float]]] = {}

    @staticmethod
    def pick(case: Case, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads, head_dim) to the tested (sequence, head) pairs: (pairs, tokens, head_dim)."""
        generator = torch.Generator().manual_seed(1)
        count = min(PARITY_PAIRS, case.batch_size * case.num_heads)
        chosen = torch.randperm(case.batch_size * case.num_heads, generator=generator)[:count].tolist()
        chosen[0], chosen[-1] = 0, case.batch_size * case.num_heads - 1
        return torch.stack([x[i // case.num_heads, :, i % case.num_heads] for i in chosen])

    def get(
        self, case: Case, inputs: list[torch.Tensor], upstream: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[float]]:
        """Exact output, dq, dk, dv (on the host) and the largest error that each may have."""
        key = (case.batch_size, case.context_length, case.num_heads, case.head_dim, case.causal, case.window)
        key += (case.dtype,)
        if key not in self.known:
            parts = inputs[0].unbind(2) if case.layout == "packed" else inputs
            picked = [self.pick(case, x.detach()) for x in (*parts, upstream)]
            dtype = DTYPES[case.dtype]
            wide = torch.float64 if dtype == torch.float32 else torch.float32
            exact = attention_by_blocks(picked, case.causal, case.window, wide)
            plain = attention_by_blocks(picked, case.causal, case.window, dtype)
            # In fp32 the plain error is a few roundings itself, and another order of summation costs some more.
            eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
            allowed = []
            for ours, right in zip(plain, exact, strict=True):
                rounding = eps * max(1.0, right.abs().max().item())
                allowed.append(2 * (ours.to(wide) - right).abs().max().item() + rounding)
            self.known[key] = ([x.cpu() for x in exact], allowed)
        return self.known[key]

    def compare(
        self, case: Case, results: list[torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
    ) -> dict[str, tuple[float, float]]:
        """Largest absolute error and the allowed one for output, dq, dk and dv; NaN counts as infinite."""
        exact, allowed = self.get(case, inputs, upstream)
        errors = {}
        for name, result, right, limit in zip(TENSORS, results, exact, allowed, strict=True):
            difference = (self.pick(case, result).to(right.dtype) - right.to(result.device)).abs().max().item()
            errors[name] = (difference if difference == difference else float("inf"), limit)
        return errors


# --------------------------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------------------------


class Timer:
    """Times forward and backward of one function, on the GPU's clock where there is one."""

    def __init__(
        self, device: torch.device, function: Callable[[], torch.Tensor], inputs: list[torch.Tensor], upstream
    ):
        self.device, self.function, self.inputs, self.upstream = device, function, inputs, upstream
        self.cuda = device.type == "cuda"

    def once(self) -> tuple[Any, Any, Any]:
        """One forward and backward; the marks before, between and after."""
        marks = [self._mark()]
        output = self.function()
        marks.append(self._mark())
        torch.autograd.grad(output, self.inputs, self.upstream)
        marks.append(self._mark())
        return tuple(marks)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.cuda else 1000 * (end - begin)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def warm_up(self, seconds: float) -> float:
        """Run for `seconds`, at least twice; returns the milliseconds of one repetition."""
        self.once()
        self.wait()
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < seconds:
            self.once()
            self.wait()
            count += 1
        return 1000 * (time.perf_counter() - begin) / count

    def measure(self, seconds: float, warm_up_seconds: float) -> tuple[dict[str, list[float]], float, float | None]:
        """Milliseconds of each repetition by direction, of the host to launch one, and the clock in MHz (GPU only)."""
        estimate = self.warm_up(warm_up_seconds)
        # At most 25: the GPU's queue takes about a thousand launches before the host has to wait.
        repetitions = min(25, max(5, int(1000 * seconds / estimate)))
        # Keeps the GPU busy while the host queues: all repetitions of a short kernel. A long one needs a start only;
        # idling longer would let a power-limited card run its first repetitions at a higher clock.
        spin_ms = 2 * estimate * repetitions if estimate < 2 else 5.0
        for attempt in range(HEAD_STARTS):
            if self.cuda:
                torch.cuda._sleep(int(spin_ms * 2e6))  # cycles, at about 2 GHz
            begin = time.perf_counter()
            marks = [self.once() for _ in range(repetitions)]
            host_ms = 1000 * (time.perf_counter() - begin) / repetitions
            # Has the GPU caught up? Then it waited for the host, and the times would be the host's.
            if not self.cuda or not marks[-2][2].query() or attempt == HEAD_STARTS - 1:
                break
            self.wait()
            spin_ms = max(2 * spin_ms, 2 * host_ms * repetitions)
        clock = gpu_clock_mhz(self.device) if self.cuda else None
        times = {
            "forward": [self._milliseconds(a, b) for a, b, _ in marks],
            "backward": [self._milliseconds(b, c) for _, b, c in marks],
            "forward_backward": [self._milliseconds(a, c) for a, _, c in marks],
        }
        return times, host_ms, clock


def longest_kernel(function: Callable[[], Any], device: torch.device) -> tuple[Any, str]:
    """Run a function under the profiler; its result and the name of the GPU kernel that took longest ("" if none)."""
    if device.type != "cuda":
        return function(), ""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        result = function()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return result, ""
    name = max(kernels, key=lambda event: event.device_time_total).name
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return result, re.split(r"[<(]", name)[0][:100]


# --------------------------------------------------------------------------------------------------------------------
# One case
# --------------------------------------------------------------------------------------------------------------------


def clean(device: torch.device) -> None:
    """Leave nothing of the case before in the allocator, its cached masks included (flex keeps its: a few KiB)."""
    score_bias.cache_clear()
    sequence_starts.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        # cuBLAS keeps a workspace for each thread in the allocator, one for the backward pass too; with both in place
        # no case pays for having been the first.
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
            (x @ x).sum().backward()
        del x


def measure_memory(
    case: Case, device: torch.device, inputs: list, upstream: torch.Tensor, held: int, limit: int | None
):
    """Peak bytes of one forward and of forward with backward: ({direction: all held}, {direction: above the inputs}).

    Args:
        held: bytes that were allocated before the inputs were made (GPU).
        limit: without a GPU, live bytes beyond this are out of memory.
    """
    tracker = MemoryTracker(device, limit_bytes=limit)
    with tracker.step(1):
        if not tracker.cuda:
            for tensor in (*inputs, upstream):
                tracker.counter.add(tensor)
        with tracker.phase("forward_backward"):
            with tracker.phase("forward"):
                output = forward(case, inputs)
            torch.autograd.grad(output, inputs, upstream)
    rows = tracker.step_rows
    held = held if tracker.cuda else 0
    total = {name: row.peak_allocated - held for name, row in rows.items()}
    start = rows["forward"].start_allocated - held
    return total, {name: peak - start for name, peak in total.items()}


def measure(
    case: Case,
    device: torch.device,
    reference: Reference,
    *,
    seconds: float,
    warm_up_seconds: float,
    earlier: Measurement | None = None,
    limit_bytes: int | None = None,
) -> Measurement:
    """Measure a case, or add another round of times to an `earlier` measurement of it.

    Args:
        seconds: time for the timed repetitions (5 to 25 of them).
        limit_bytes: without a GPU, live bytes beyond this are out of memory.

    Returns:
        The measurement. An out-of-memory error, a refusal or a failure is its status; the reason stands beside it.
    """
    measurement = earlier or Measurement(case)
    if measurement.status != "ok":
        return measurement
    clean(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    message = ""
    try:
        if earlier is None:
            _examine(measurement, device, reference, held, limit_bytes)
        if measurement.status == "ok":
            _time(measurement, device, seconds, warm_up_seconds, first=earlier is None)
    except SettingsError as error:
        measurement.status, message = "unsupported", str(error)
    except (RuntimeError, MemoryError, ValueError, TypeError) as error:
        measurement.status = "oom" if is_out_of_memory(error) else "error"
        message = f"{type(error).__name__}: {error}"
    # Out of the except block its traceback, and with it the tensors of the failed case, can go.
    measurement.reason = " ".join(message.split())[:300] or measurement.reason
    return measurement


def _examine(
    measurement: Measurement, device: torch.device, reference: Reference, held: int, limit_bytes: int | None
) -> None:
    """Support, parity and memory of a case."""
    case = measurement.case
    dtype = DTYPES[case.dtype]
    options: dict[str, Any] = {"causal": case.causal, "tokens": case.context_length}
    if case.backend == "auto":
        packed = case.layout == "packed"
        backend, why = choose_backend(device, dtype, case.window, case.head_dim, packed=packed, **options)
        measurement.chosen_backend, measurement.reason = backend, why
    else:
        measurement.chosen_backend = case.backend
        reason = unsupported_reason(case.backend, device, dtype, case.window, case.head_dim, **options)
        if reason is not None:
            measurement.status, measurement.reason = "unsupported", reason
            return
    inputs, upstream = make_inputs(case, device)
    with observe_kernel() as observer:
        output = forward(case, inputs)
    measurement.operator = observer.name
    gradients = torch.autograd.grad(output, inputs, upstream)
    gradients = list(gradients[0].unbind(2)) if case.layout == "packed" else list(gradients)
    measurement.errors = reference.compare(case, [output.detach(), *gradients], inputs, upstream)
    del output, gradients
    wrong = [
        f"{name} {error:.2e} > {limit:.2e}" for name, (error, limit) in measurement.errors.items() if error > limit
    ]
    if wrong:
        measurement.status, measurement.reason = "error", f"parity: {', '.join(wrong)}"
        return
    clean(device)
    measurement.peak_bytes, measurement.peak_above_inputs_bytes = measure_memory(
        case, device, inputs, upstream, held, limit_bytes
    )


def _time(measurement: Measurement, device: torch.device, seconds: float, warm_up_seconds: float, first: bool) -> None:
    case = measurement.case
    inputs, upstream = make_inputs(case, device)
    timer = Timer(device, lambda: forward(case, inputs), inputs, upstream)
    times, host_ms, clock = timer.measure(seconds, warm_up_seconds)
    measurement.rounds.append(times)
    measurement.host_ms.append(host_ms)
    if clock is not None:
        measurement.clock_mhz.append(clock)
    if first:
        output, measurement.kernels["forward"] = longest_kernel(lambda: forward(case, inputs), device)
        _, measurement.kernels["backward"] = longest_kernel(
            lambda: torch.autograd.grad(output, inputs, upstream), device
        )


# --------------------------------------------------------------------------------------------------------------------
# Many cases
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all cases of a process share."""

    device: torch.device
    dtype: str
    rounds: int
    seconds: float  # timed, for each case and round; twice as much warms up
    seed: int = 0  # of the random order
    limit_bytes: int | None = None
    reference: Reference = field(default_factory=Reference)

    def __post_init__(self) -> None:
        # What exists now stays: collecting garbage between cases then takes no time.
        gc.collect()
        gc.freeze()

    def measure(self, case: Case, earlier: Measurement | None = None) -> Measurement:
        """One round of a case."""
        return measure(
            case,
            self.device,
            self.reference,
            seconds=self.seconds,
            warm_up_seconds=2 * self.seconds,
            earlier=earlier,
            limit_bytes=self.limit_bytes,
        )

    def measure_all(self, cases: list[Case], after_round: Callable[[list[Measurement]], None]) -> None:
        """Every case, each round in another random order; `after_round` gets all measurements so far."""
        order = random.Random(self.seed)
        known: dict[Case, Measurement] = {}
        with tqdm(total=self.rounds * len(cases), unit="case", desc="attention", mininterval=1.0) as bar:
            for number in range(self.rounds * (1 + MORE_ROUNDS)):
                chosen = cases if number < self.rounds else [case for case in cases if is_unsettled(known[case])]
                if number >= self.rounds:
                    bar.total += len(chosen)
                for case in order.sample(chosen, len(chosen)):
                    bar.set_postfix_str(f"{case.backend} {case.batch_size}x{case.context_length}", refresh=False)
                    known[case] = self.measure(case, known.get(case))
                    bar.update()
                if chosen:
                    after_round([known[case] for case in cases])


def is_unsettled(measurement: Measurement) -> bool:
    """Whether the rounds of a case still differ by more than UNSETTLED; with one round there is nothing to tell."""
    return any(difference > UNSETTLED for difference in round_differences(measurement, "forward_backward"))


def median(measurement: Measurement, direction: str) -> float:
    """Median milliseconds over the repetitions of all rounds."""
    return percentile([ms for times in measurement.rounds for ms in times[direction]], 50)


def differences(medians: list[float]) -> list[float]:
    """How far the medians of two rounds lie apart, relative to the smaller: one for each pair of rounds."""
    return [abs(a - b) / min(a, b) for a, b in combinations(medians, 2)]


def round_differences(measurement: Measurement, direction: str) -> list[float]:
    """`differences` between the rounds of a case."""
    return differences([percentile(times[direction], 50) for times in measurement.rounds])


def case_noise(medians: list[float]) -> float | None:
    """How far two rounds of a case typically lie apart: the median over all pairs; None with one round.

    The median, because a single round that met a hiccup of the host does not move the reported median either.
    """
    return percentile(differences(medians), 50)


def noise_floor(cases: list[list[float]]) -> float | None:
    """95th percentile of the noise of all cases, each given as the medians of its rounds; None with one round."""
    noises = [case_noise(medians) for medians in cases]
    return percentile([noise for noise in noises if noise is not None], 95)
