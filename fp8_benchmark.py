"""From which width on FP8 pays: matrix products, linear layers and whole blocks, in bf16 and in FP8, time and memory.

    python fp8_benchmark.py                                              everything; some six minutes on an H100
    python fp8_benchmark.py --questions layers --widths 768,4096 --recipes tensorwise

Three questions, each a table and rows of outputs/fp8/<run_name>/results.csv:

products  the three products of a linear layer's training step, operands already in 8 bits: what the tensor cores can do
layers    the same layer as it trains (compiled, forward and backward, fp32 weights under autocast): the casts, and the
          passes that look for the largest value, are inside. layer - products is what the casts cost
blocks    a whole block of each of the lab's models, attention and norms included, which FP8 does not touch

Why there is a break-even width: the products take tokens x in x out operations and the casts pass over tokens x in,
in x out and tokens x out numbers, so the gain grows with the width and the cost's share falls. Memory stands beside
speed because FP8 training promises to save none of it: torchao's layer keeps its 16-bit input, unless the compiler
decides otherwise (`kept_gib`).

What a layer or block computes is compared with fp32 before it is timed. Times are of CUDA graphs: a layer alone runs
for less time than its launches take, which in a compiled model lie hidden behind its neighbours. Every recipe is timed
in turn with bf16, because a card under load changes its clock. The median of the clocks read right after the rounds
stands in each row, a hint at what the card did meanwhile; a row below half of the highest clock is `throttled` and has
no speedup: a card held back by heat multiplies slowly while its memory, and so the casts, stay as fast as ever. Weights
are fp32 under autocast, and so is what a block adds up. Without a GPU of compute capability 8.9 there is nothing to
measure.

Sources: torchao.float8 and its tables for H100
(https://docs.pytorch.org/ao/stable/workflows/training.html); Micikevicius et al. 2022, arXiv 2209.05433.
"""

import csv
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cuda_graphs import RecordedStep
from fp8_results import COLUMNS, QUESTIONS, SHAPES, break_even, in_words
from precision import FP8_MULTIPLE, FP8_RECIPES, autocast, convert_to_fp8, fp8_unsupported_reason, set_precision
from run_folder import RunFolder, describe_environment, now
from technique_bench import Cost, clearly_faster, gpu_clock_mhz, interleaved, measure, middle, relative_error
from transformer_based_llm import MODEL_SIZES, TransformerLM, model_config
from utils import (
    GIB,
    SettingsError,
    parse_settings,
    peak_tflops,
    percentile,
    read_names,
    read_rising,
    run_script,
    setting,
    unless_out_of_memory,
)

LARGEST_ERROR = 0.25  # of output and gradients against fp32; 4 bits of mantissa round by some per cent
LOAD_SECONDS = 0.3  # of work before the first round: a rested card begins at a clock that it cannot hold
ROUNDS = 3  # of a step's repeats, in turn with bf16's
THROTTLED = 0.5  # of the highest clock seen; what ran below has no time


@dataclass
class Settings:
    """Settings of `python fp8_benchmark.py`."""

    questions: str = setting("products,layers,blocks", "which tables, of " + ", ".join(QUESTIONS))
    widths: str = setting(
        "512,768,1024,1536,2048,3072,4096,8192", "widths of products and layers, each a multiple of 16"
    )
    tokens: str = setting("4096,32768", "tokens in a batch of products and layers, each a multiple of 16")
    recipes: str = setting(",".join(FP8_RECIPES), "of torchao, compared with bf16")
    models: str = setting(
        "gpt2,gpt2-medium,gpt2-large,gpt2-xl,llama-1b,llama-8b", "model sizes whose block is measured"
    )
    block_tokens: int = setting(16384, "tokens in a batch of the blocks")
    attention_backend: str = setting("sdpa_cudnn", "attention kernel of the blocks")
    repeats: int = setting(10, f"timed steps of a round; each row has {ROUNDS} rounds, in turn with bf16's")
    output_folder: str = setting("outputs", "folder of all results")
    experiment: str = setting("fp8", "folder of this experiment's runs")
    run_name: str = setting("benchmark", "folder of this run; -2, -3, ... if it is there")


# --------------------------------------------------------------------------------------------------------------------
# The operations
# --------------------------------------------------------------------------------------------------------------------


def scaled(values: torch.Tensor, dtype: torch.dtype, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (rows, columns) in 8 bits and the fp32 scale that turns it back: one number, or (rows, 1)."""
    largest = values.abs().amax(dim=1, keepdim=True) if rowwise else values.abs().amax()
    scale = largest.float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (values.float() / scale).to(dtype), scale


def scaled_product(left: torch.Tensor, right: torch.Tensor, recipe: str, role: str) -> Callable[[], torch.Tensor]:
    """left (rows, inner) @ right (inner, columns) in FP8, operands cast and laid out beforehand.

    Args:
        role: output, grad_input or grad_weight: tensorwise has gradients (the left operand of the last two) in e5m2,
            and only the first accumulates fast, as in torchao's recipes.
    """
    rowwise = recipe != "tensorwise"
    gradient = torch.float8_e4m3fn if rowwise or role == "output" else torch.float8_e5m2
    a, scale_a = scaled(left, gradient, rowwise)
    b, scale_b = scaled(right.T.contiguous(), torch.float8_e4m3fn, rowwise)  # (columns, inner), columns of `right`
    scale_b = scale_b.T.contiguous() if rowwise else scale_b
    fast = role == "output" or rowwise
    return lambda: torch._scaled_mm(a, b.T, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


def three_products(tokens: int, inputs: int, outputs: int, variant: str) -> Callable[[], torch.Tensor]:
    """The products of a linear layer's step, random numbers, without any cast: output, both gradients."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, weight = torch.randn(tokens, inputs, **options), torch.randn(outputs, inputs, **options)
    gradient = torch.randn(tokens, outputs, **options)
    operands = {
        "output": (hidden, weight.T),
        "grad_input": (gradient, weight),
        "grad_weight": (gradient.T.contiguous(), hidden),
    }
    products: list[Callable[[], torch.Tensor]] = []
    for role, (left, right) in operands.items():
        if variant == "bf16" or (variant == "rowwise_with_gw_hp" and role == "grad_weight"):
            if role == "grad_weight":
                left = gradient.T  # the layout in which autograd has it
            products.append(lambda left=left, right=right: left @ right)
        else:
            products.append(scaled_product(left, right, variant, role))

    def step() -> torch.Tensor:
        return torch.stack([product()[0, 0] for product in products])

    return step


class Step:
    """Forward and backward pass of a module on fixed numbers, compiled, in bf16 or with its linear layers in FP8.

    Args:
        module: on the GPU with fp32 parameters; converted in place.
        shape: of its input, the last axis is the width.
        dtype: of its input, as the model hands it over (the reference gets the same numbers in fp32).
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], variant: str, dtype: torch.dtype):
        generator = torch.Generator("cuda").manual_seed(1)
        self.inputs = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        self.inputs = (self.inputs.float() if variant == "fp32" else self.inputs).requires_grad_()
        self.module, self.variant = module, variant
        if variant in FP8_RECIPES:
            holder = nn.ModuleList([module])  # torchao swaps layers inside a module
            convert_to_fp8(holder, variant)
            self.module = holder[0]
        self.run = self.module
        with torch.no_grad():  # not compiled yet: without gradients it would be another graph
            output = self.forward()
        self.gradient = torch.randn(output.shape, device="cuda", generator=generator) / shape[-1] ** 0.5
        if variant != "fp32":
            self.run = torch.compile(self.module, fullgraph=True)

    def forward(self) -> torch.Tensor:
        with autocast("fp32" if self.variant == "fp32" else "bf16", self.inputs.device):
            return self.run(self.inputs)

    def __call__(self) -> torch.Tensor:
        output = self.forward()
        output.backward(self.gradient.to(output.dtype))
        self.inputs.grad = None
        self.module.zero_grad(set_to_none=True)
        return output.detach().flatten()[:1]

    def results(self) -> list[torch.Tensor]:
        """The output, and the gradients of input and parameters, on the GPU."""
        output = self.forward()
        output.backward(self.gradient.to(output.dtype))
        found = [output.detach(), self.inputs.grad, *(p.grad for p in self.module.parameters())]
        self.inputs.grad = None
        self.module.zero_grad(set_to_none=True)
        return found

    def kept_gib(self) -> float:
        """GiB that the forward pass leaves for the backward pass (without its own output)."""
        before = torch.cuda.memory_allocated()
        output = self.forward()  # lives as long as its graph does
        held = torch.cuda.memory_allocated() - before - output.numel() * output.element_size()
        return held / GIB


# --------------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Benchmark:
    """Collects rows; each is printed and appended to results.csv as soon as it is there."""

    settings: Settings
    run: RunFolder
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    base: RecordedStep | None = None  # bf16's step of the group being measured
    highest_mhz: float = 0.0

    def add(self, cost: Cost, *, flop: float, variant: str, base: Cost | None = None, **facts: Any) -> None:
        """One row; `speedup` is against `base`, bf16's time in the same rounds."""
        ok = cost.status == "ok"
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | facts
        row |= {"variant": variant, "status": cost.status, "ms": cost.ms, "ms_p20": cost.ms_p20, "ms_p80": cost.ms_p80}
        row |= {"n": cost.n, "peak_gib": cost.peak_gib if facts["question"] != "products" else None}
        row["tflops"] = round(flop / cost.ms / 1e9, 1) if ok else None
        row["bf16_ms"] = None if base is None else base.ms
        row["speedup"] = round(base.ms / cost.ms, 4) if ok and base is not None and base.ms else None
        self.rows.append(row)
        with (self.run.path / "results.csv").open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(row)

        def shown(value: float | None, style: str) -> str:
            return "-" if value is None else format(value, style)

        sizes = f"{row['tokens']:>7}{row['inputs'] or '':>7}{row['outputs'] or '':>7}"
        time = f"{shown(row['ms'], '.3f') if ok else cost.status:>9} ms{shown(row['tflops'], '.0f'):>6} TFLOP/s"
        clock = f"{shown(row['clock_mhz'], '.0f'):>6} MHz"
        memory = f"{shown(row['kept_gib'], '.3f'):>8}{shown(row['peak_gib'], '.3f'):>8} GiB"
        tqdm.write(
            f"{row['question']:<9}{row['name']:<12}{sizes}  {variant:<19}{time}{shown(row['speedup'], '.2f'):>6} x"
            f"{clock}{memory}{shown(row['error'], '.1e'):>9}"
        )

    def measure(self, step: Callable[[], torch.Tensor] | None, variant: str) -> tuple[Cost, dict[str, Any]]:
        """Time of the recorded step and peak memory of the launched one; what else the row says of its time.

        A step that is None did not fit into the memory.
        bf16 comes first in each group of rows and stays recorded, for the recipes to be timed in turn with it. Costs of
        several rounds are the round with the median time; `n` counts the steps of all rounds.
        """
        self.base = None if variant == "bf16" else self.base
        launched = Cost("oom") if step is None else measure(step, self.device, repeats=1, compiled=True)
        if launched.status != "ok":
            return launched, {}
        steps = {"own": (RecordedStep(step), ())}
        if self.base is not None:
            steps = {"bf16": (self.base, ()), **steps}
        if unless_out_of_memory(lambda: self.load([step for step, _ in steps.values()])) is None:
            return Cost("oom"), {}
        rounds: dict[str, list[Cost]] = {name: [] for name in steps}
        clocks = []
        for _ in range(ROUNDS):
            found = interleaved(steps, self.device, rounds=1, repeats=self.settings.repeats, compiled=True)
            clocks.append(self.clock())
            for name, costs in found.items():
                rounds[name] += costs
        clock = percentile(clocks, 50)
        cost, seen = middle(rounds["own"]), {"clock_mhz": round(clock)}
        if cost.status != "ok":
            return cost, seen
        if clock < THROTTLED * self.highest_mhz:
            cost = replace(cost, status="throttled")
        elif self.base is not None:
            seen["clear"] = "yes" if clearly_faster(rounds["own"], rounds["bf16"]) else "no"
        if variant == "bf16":
            self.base = steps["own"][0]
        else:
            seen["base"] = middle(rounds["bf16"]) if "bf16" in rounds else None
        n = sum(one.n for one in rounds["own"])
        return replace(cost, n=n, start_gib=launched.start_gib, peak_gib=launched.peak_gib), seen

    def load(self, steps: list[Callable[[], torch.Tensor]]) -> int:
        """Run the steps in turn for LOAD_SECONDS, at least once, which records them; how often they ran."""
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < LOAD_SECONDS:
            for step in steps:
                step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            count += 1
        return count

    def clock(self) -> float:
        """The GPU's clock in MHz now; remembers the highest one."""
        clock = gpu_clock_mhz(self.device)
        self.highest_mhz = max(self.highest_mhz, clock)
        return clock

    def products(self, name: str, width: int, tokens: int, inputs: int, outputs: int, variant: str) -> None:
        step = unless_out_of_memory(lambda: three_products(tokens, inputs, outputs, variant))
        cost, seen = self.measure(step, variant)
        facts = {"name": name, "width": width, "tokens": tokens, "inputs": inputs, "outputs": outputs}
        self.add(cost, question="products", flop=6 * tokens * inputs * outputs, variant=variant, **facts, **seen)

    def module(
        self, question: str, build: Callable[[str], nn.Module], shape: tuple[int, ...], flop: float, **facts: Any
    ) -> None:
        """Rows of one module, built for a variant: fp32 as reference (not timed), bf16 and every recipe."""
        self.base = None
        exact: list[torch.Tensor] | None = None
        for variant in ("fp32", "bf16", *self.settings.recipes.split(",")):
            step, found = None, None  # of the variant before
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            torch.manual_seed(0)
            others = torch.cuda.memory_allocated()  # the reference's results, which are not the module's
            dtype = torch.bfloat16 if question == "layers" else torch.float32
            step = unless_out_of_memory(lambda: Step(build(variant), shape, variant, dtype))  # noqa: B023
            found = None if step is None else unless_out_of_memory(step.results)
            if variant == "fp32":
                exact = found
                continue
            if found is None or exact is None:  # without the reference nothing is compared, so nothing is timed
                self.add(Cost("oom"), question=question, flop=flop, variant=variant, **facts)
                continue
            error = relative_error(found, exact)
            del found
            same = error < LARGEST_ERROR  # what computes another function gets no time
            cost, timed = self.measure(step, variant) if same else (Cost("error"), {})
            kept = unless_out_of_memory(step.kept_gib) if cost.status in ("ok", "throttled") else None
            if cost.peak_gib is not None:
                cost = replace(cost, peak_gib=round(cost.peak_gib - others / GIB, 5))
            seen = {"kept_gib": None if kept is None else round(kept, 5), "error": float(f"{error:.3g}")}
            self.add(cost, question=question, flop=flop, variant=variant, **facts, **seen, **timed)


def block_of(size: str, attention_backend: str) -> tuple[Callable[[str], nn.Module], int, int, float]:
    """A block of a model size: how to build it on the GPU for a variant, its width, context and FLOPs a token.

    The models of the lab with a context of 256 get 1024, GPT-2's own. The fp32 variant has PyTorch's choice of kernel.
    """
    context = max(MODEL_SIZES[size]["context_length"], 1024)
    overrides = {"num_layers": 1, "context_length": context, "vocab_size": 16}
    config = model_config(size, **overrides)

    def build(variant: str) -> nn.Module:
        backend = "sdpa" if variant == "fp32" else attention_backend
        with torch.device("cuda"):
            return TransformerLM(model_config(size, **overrides, attention_backend=backend)).blocks[0]

    with torch.device("meta"):
        block = TransformerLM(config).blocks[0]
    products = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
    return build, config.embedding_dim, context, 6 * products + 12 * config.embedding_dim * context


def check(settings: Settings, device: torch.device) -> None:
    """Raise a SettingsError for wrong settings, or where FP8 cannot run; lists of names lose their spaces."""
    for flag, known in (("questions", QUESTIONS), ("recipes", FP8_RECIPES), ("models", list(MODEL_SIZES))):
        setattr(settings, flag, ",".join(read_names(flag, getattr(settings, flag), known)))
    for flag in ("widths", "tokens"):
        read_rising(flag, getattr(settings, flag), multiple=FP8_MULTIPLE)
    if settings.repeats < 1:
        raise SettingsError(f"--repeats must be at least 1, not {settings.repeats}")
    if settings.block_tokens < 4096 or settings.block_tokens % 4096:
        raise SettingsError(f"--block_tokens {settings.block_tokens} must be a multiple of 4096, the longest context")
    reason = fp8_unsupported_reason(device, compiled=True, emulated=False)
    if reason is not None:
        raise SettingsError(f"nothing to measure: {reason.split('; take --precision')[0]}")


def main() -> int:
    """Measure what --questions asks for, print the tables and the break-even widths, leave a run folder."""
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(settings, device)
    set_precision("fp32", device)  # the reference is fp32 and not TF32
    questions = settings.questions.split(",")
    run = RunFolder.create(settings.output_folder, settings.experiment, settings.run_name, unique=True)
    run.update(
        status="running",
        experiment=settings.experiment,
        run_name=run.path.name,
        **describe_environment(device),
        settings=asdict(settings),
        peak_tflops={kind: peak_tflops(torch.cuda.get_device_name(device), kind) for kind in ("bf16", "fp8")},
    )
    bench = Benchmark(settings, run, device)
    bench.highest_mhz = getattr(torch.cuda.get_device_properties(device), "clock_rate", 0) / 1000  # given in kHz
    for _ in range(200):  # some tenth of a second, in which an idle card reaches its highest clock
        bench.clock()
    shapes = [
        (name, width, tokens, width * inputs, width * outputs)
        for name, inputs, outputs in SHAPES
        for tokens in read_rising("tokens", settings.tokens, multiple=FP8_MULTIPLE)
        for width in read_rising("widths", settings.widths, multiple=FP8_MULTIPLE)
    ]
    jobs: list[Callable[[], None]] = []
    if "products" in questions:
        for shape in shapes:
            jobs += [lambda s=shape, v=v: bench.products(*s, v) for v in ("bf16", *settings.recipes.split(","))]
    if "layers" in questions:
        for name, width, tokens, inputs, outputs in shapes:
            facts = {"name": name, "width": width, "tokens": tokens, "inputs": inputs, "outputs": outputs}
            build = lambda variant, i=inputs, o=outputs: nn.Linear(i, o, bias=False, device="cuda")  # noqa: E731
            flop = 6 * tokens * inputs * outputs
            jobs.append(lambda b=build, s=(tokens, inputs), f=flop, k=facts: bench.module("layers", b, s, f, **k))
    if "blocks" in questions:
        for size in settings.models.split(","):
            build, width, context, flop = block_of(size, settings.attention_backend)
            shape = (settings.block_tokens // context, context, width)
            facts = {"name": size, "width": width, "tokens": settings.block_tokens}
            flop *= settings.block_tokens
            jobs.append(lambda b=build, s=shape, f=flop, k=facts: bench.module("blocks", b, s, f, **k))
    try:
        for job in tqdm(jobs, desc="measuring", leave=False, disable=None):
            job()
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        run.update(status=status, error=f"{type(error).__name__}: {error}"[:300])
        raise
    answers = [answer for question in questions for answer in break_even(bench.rows, question)]
    for answer in answers:
        print(
            f"{answer['question']} {answer['name']}, {answer['tokens']} tokens, {answer['recipe']}: {in_words(answer)}"
        )
    slow = sum(row["status"] == "throttled" for row in bench.rows)
    if slow:
        print(
            f"{slow} rows are throttled: after their rounds the card's clock was below {THROTTLED:.0%} of the "
            f"{bench.highest_mhz:.0f} MHz that it can reach, held back by its limit of power or heat"
        )
    results = {"rows": len(bench.rows), "throttled": slow, "highest_clock_mhz": round(bench.highest_mhz)}
    run.update(status="ok", results=results | {"break_even": answers}, finished_at=now())
    print(json.dumps({"run": str(run.path), "status": "ok", "rows": len(bench.rows)}))
    return 0


if __name__ == "__main__":
    run_script(main)
