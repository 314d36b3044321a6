"""Which configurations the comparison of compare_techniques.py runs: names, flags and words of every case.

    python compare_techniques.py --list true        every case of the nine runs' experiment with its flags and status

A case is one process of llm_train.py (or gpt2_peer.py, the peer). Its flags here are all that decide about its result;
the runner adds where the text comes from and where the results go. In each experiment a case differs from its base in
what its name says and in nothing else. `smoke` makes the same cases small enough for a laptop without a GPU.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from case_runner import Case, read_flags, split_list
from utils import SettingsError, read_names

EXPERIMENTS = ("seed", "factorial", "max_batch", "quality")
SMOKE_BATCH = {64: 8, 125: 8, 195: 12, 303: 19}
MEMORY_BUDGETS, SMOKE_BUDGETS = "8,12,24,45,48,80", "0.05,0.1"  # GiB; 45 is the A40 of the plwiki lab

# --------------------------------------------------------------------------------------------------------------------
# The tables: name, flags beyond those that every case of the experiment has, words for a reader
# --------------------------------------------------------------------------------------------------------------------

# fmt: off
FP32 = "--precision fp32 --attention_backend eager"
FP16 = "--use_fp16 true --attention_backend eager"  # the plwiki lab's flag; it means BF16 autocast
BF16 = "--precision bf16 --attention_backend eager"
FLASH = "--use_flash_attention true"
WINDOW = f"{FLASH} --attention_window 64,0"
COMPILE = f"{FLASH} --use_compile true"
BLOCK, CHUNKED = "--gradient_checkpointing block", "--loss chunked"

SEED_CASES = (  # batch size is the number at the end of the name
    # the nine runs of the plwiki lab, which used Adam
    ("fp32-baseline-batch-125", f"{FP32} --optimizer adam", "fp32, textbook attention"),
    ("fp16-batch-125", f"{FP16} --optimizer adam", "bf16 autocast (the plwiki lab's fp16)"),
    ("fp16-batch-195", f"{FP16} --optimizer adam", "the same, batch 195"),
    ("flash-attention-batch-125", f"{FLASH} --optimizer adam", "bf16, flash attention"),
    ("flash-attention-batch-195", f"{FLASH} --optimizer adam", "the same, batch 195"),
    ("flash-attention-window-(64,0)-batch-125", f"{WINDOW} --optimizer adam", "bf16, flash attention, window of 64"),
    ("flash-attention-window-(64,0)-batch-195", f"{WINDOW} --optimizer adam", "the same, batch 195"),
    ("fp32-gradient-checkpointing-batch-125", f"{FP32} --use_gradient_checkpointing true --optimizer adam",
     "fp32, every block recomputed"),
    ("fp32-gradient-checkpointing-batch-303", f"{FP32} --use_gradient_checkpointing true --optimizer adam",
     "the same, batch 303"),
    # what they lacked: attention and precision apart
    ("fp32-sdpa-batch-125", "--precision fp32 --attention_backend sdpa --optimizer adam", "fp32, PyTorch's SDPA"),
    ("bf16-sdpa-batch-125", "--precision bf16 --attention_backend sdpa --optimizer adam", "bf16, PyTorch's SDPA"),
    # one change to flash attention with AdamW
    ("flash-attention-adamw-batch-125", FLASH, "bf16, flash attention, AdamW: the base of the following"),
    ("flash-checkpointing-batch-125", f"{FLASH} {BLOCK}", "every block recomputed"),
    ("flash-every-2-batch-125", f"{FLASH} --gradient_checkpointing every_k --checkpoint_every 2",
     "every second block recomputed"),
    ("flash-selective-batch-125", f"{FLASH} --gradient_checkpointing selective", "attention kept, the rest recomputed"),
    ("flash-selective-matmul-batch-125", f"{FLASH} --gradient_checkpointing selective_matmul",
     "matrix products kept, the rest recomputed"),
    ("flash-offload-batch-125", f"{FLASH} --gradient_checkpointing offload",
     "every block recomputed, its input in host memory"),
    ("flash-chunked-loss-batch-125", f"{FLASH} {CHUNKED}", "logits in chunks"),
    ("flash-fused-loss-batch-125", f"{FLASH} --loss fused", "fused linear cross-entropy kernel"),
    ("flash-fused-gelu-batch-125", f"{FLASH} --gelu fused", "bias, GELU and their gradients in one kernel each"),
    ("flash-recomputed-gelu-batch-125", f"{FLASH} --gelu recomputed", "and GELU's output made again"),
    ("flash-8bit-adamw-batch-125", f"{FLASH} --optimizer adamw_8bit", "optimizer states in 8 bits"),
    ("flash-optimizer-in-backward-batch-125", f"{FLASH} --optimizer_in_backward true", "gradients never coexist"),
    ("flash-bf16-master-batch-125", f"{FLASH} --parameters bf16_master", "bf16 parameters, fp32 master copy"),
    ("flash-bf16-stochastic-batch-125", f"{FLASH} --parameters bf16_stochastic",
     "bf16 parameters, stochastic rounding"),
    # combinations
    ("flash-checkpointing-chunked-loss-batch-125", f"{FLASH} {BLOCK} {CHUNKED}", "blocks recomputed, chunked loss"),
    ("flash-compile-batch-125", f"{COMPILE} --profile_steps 3", "compiled"),
    ("flash-compile-chunked-loss-batch-125", f"{COMPILE} {CHUNKED}", "compiled, chunked loss"),
    ("flash-compile-memory-budget-0.5-batch-125", f"{COMPILE} {CHUNKED} --activation_memory_budget 0.5",
     "compiled within half of the activations, chunked loss"),
    ("flash-compile-checkpointing-chunked-loss-batch-125", f"{COMPILE} {BLOCK} {CHUNKED}",
     "compiled, blocks recomputed, chunked loss"),
    ("flash-compile-selective-chunked-loss-batch-125", f"{COMPILE} --gradient_checkpointing selective {CHUNKED}",
     "compiled, attention kept and the rest recomputed, chunked loss"),
    ("flash-compile-bf16-master-chunked-loss-batch-125", f"{COMPILE} {CHUNKED} --parameters bf16_master",
     "compiled, bf16 parameters with a master copy, chunked loss"),
    ("everything-fast-batch-125",
     f"{COMPILE} {CHUNKED} --loss_chunk_tokens 32000 --gelu fused --parameters bf16_stochastic --profile_steps 3",
     "compiled, bf16 parameters with stochastic rounding, loss in one chunk, fused GELU"),
    ("everything-small-batch-125",
     f"{COMPILE} {BLOCK} {CHUNKED} --gelu recomputed --parameters bf16_stochastic --profile_steps 3",
     "compiled, blocks recomputed, chunked loss, bf16 parameters with stochastic rounding, GELU made again"),
    ("everything-small-fused-gelu-batch-125",
     f"{COMPILE} {BLOCK} {CHUNKED} --gelu fused --parameters bf16_stochastic --profile_steps 3",
     "the same with the fused GELU, whose output the compiler keeps"),
    # the peer: gpt2_peer.py
    ("hf-gpt2-batch-125", "", "GPT-2 of transformers: SDPA, bf16 autocast, fused AdamW"),
    ("hf-gpt2-compiled-batch-125", "--use_compile true", "the same, compiled"),
)

FACTORS = {  # name: flags when off, flags when on
    "bf16": ("--precision fp32", "--precision bf16"),
    "flash": ("--attention_backend eager", "--attention_backend sdpa"),  # sdpa has a fused kernel for fp32, too
    "checkpointing": ("--gradient_checkpointing none", "--gradient_checkpointing block"),
    "chunked-loss": ("--loss full", "--loss chunked"),
    "8bit": ("--optimizer adamw", "--optimizer adamw_8bit"),
}

SMOKE_FACTORS = ("bf16", "flash", "chunked-loss")  # eight cases instead of 32

MAX_BATCH_CASES = (
    ("fp32-baseline", FP32, "fp32, textbook attention"),
    ("fp32-gradient-checkpointing", f"{FP32} {BLOCK}", "fp32, every block recomputed"),
    ("bf16", BF16, "bf16, textbook attention"),
    ("flash", FLASH, "bf16, flash attention"),
    ("flash-chunked-loss", f"{FLASH} {CHUNKED}", "and chunked loss"),
    ("flash-checkpointing", f"{FLASH} {BLOCK}", "and every block recomputed"),
    ("flash-checkpointing-chunked-loss", f"{FLASH} {BLOCK} {CHUNKED}", "and both"),
    ("everything", f"{FLASH} {BLOCK} {CHUNKED} --parameters bf16_stochastic --optimizer_in_backward true",
     "and bf16 parameters, updated in the backward pass"),
)

QUALITY_CASES = (
    ("fp32-baseline", FP32, "fp32, textbook attention"),
    ("bf16", BF16, "bf16, textbook attention"),
    ("flash", FLASH, "bf16, flash attention"),
    ("flash-window-(64,0)", WINDOW, "and a window of 64"),
    ("flash-checkpointing", f"{FLASH} {BLOCK}", "and every block recomputed"),
    ("flash-chunked-loss", f"{FLASH} {CHUNKED}", "and chunked loss"),
    ("flash-8bit-adamw", f"{FLASH} --optimizer adamw_8bit", "and 8-bit optimizer states"),
    ("flash-bf16-master", f"{FLASH} --parameters bf16_master", "and bf16 parameters with a master copy"),
    ("flash-bf16-stochastic", f"{FLASH} --parameters bf16_stochastic", "and stochastic rounding"),
    ("flash-compile", COMPILE, "compiled"),
)

CONFOUNDED_CASES = (  # an update is one batch, so an epoch has fewer of them; the batch of 125 is a seed-0 run above
    ("confounded-fp16-batch-195", BF16, "bf16, as many tokens"),
    ("confounded-flash-attention-batch-195", FLASH, "flash attention, as many tokens"),
    ("confounded-flash-attention-window-(64,0)-batch-195", WINDOW, "window of 64, as many tokens"),
    ("confounded-flash-attention-batch-303", FLASH, "flash attention, as many tokens"),
    ("confounded-fp32-gradient-checkpointing-batch-303", f"{FP32} {BLOCK}", "fp32, blocks recomputed, as many tokens"),
)
# fmt: on


def read_numbers(flag: str, text: str | None, default: str, kind: type) -> list[Any]:
    """A list of numbers from a flag.

    Raises:
        SettingsError: empty, not numbers, one twice, or out of range.
    """
    try:
        numbers = [kind(word) for word in split_list(default if text is None else text)]
    except ValueError:
        numbers = []
    valid = all(math.isfinite(number) and (number >= 0 if kind is int else number > 0) for number in numbers)
    if not numbers or not valid or len(set(numbers)) < len(numbers):
        raise SettingsError(f"--{flag} {text} must be different numbers separated by commas, such as {default}")
    return numbers


def make_cases(experiment: str, size: str, settings: Any, device_memory_gib: float | None = None) -> list[Case]:
    """Every case of an experiment in order, with all flags but those of data, device and place.

    Args:
        settings: those of compare_techniques.py; factors, memory_budget_gib, seeds and updates choose the cases.
        device_memory_gib: of the GPU, for budgets that mean the whole card; None without one.

    Raises:
        SettingsError: one of those settings is no list of different numbers or of known factors.
    """
    smoke = size == "smoke"
    model = f"--model_size {'tiny' if smoke else 'gpt2'}"
    cases = []

    def batch(number: int) -> int:
        return SMOKE_BATCH[number] if smoke else number

    def add(name: str, words: str, *flags: str, script: str = "llm_train.py") -> None:
        cases.append(Case(name, words, read_flags(" ".join((model, *flags))), script))

    if experiment == "seed":
        length = f"--max_steps {8 if smoke else 30} --tracked_steps {2 if smoke else 5} "
        length += f"--measured_steps {4 if smoke else 20}"
        for name, flags, words in SEED_CASES:
            flags = flags.replace("--profile_steps 3", "") if smoke else flags  # it reads a GPU's kernels
            size_flag = f"--batch_size {batch(int(name.rpartition('-')[2]))}"
            if name.startswith("hf-gpt2"):
                add(name, words, flags, size_flag, length, script="gpt2_peer.py")
            else:  # epochs: a short text must not end the run before its measured steps
                add(name, words, flags, size_flag, length, "--epochs 30 --evaluate_on none")
    elif experiment == "factorial":
        default = SMOKE_FACTORS if smoke else tuple(FACTORS)
        chosen = list(default) if settings.factors is None else read_names("factors", settings.factors, list(FACTORS))
        length = f"--batch_size {batch(64)} --max_steps {16 if not smoke else 8} --tracked_steps {2 if smoke else 3} "
        length += f"--measured_steps {4 if smoke else 10} --epochs 16 --evaluate_on none"
        for on in all_combinations([name for name in FACTORS if name in chosen]):
            add(combination_name(on, list(FACTORS)), "", *(FACTORS[name][name in on] for name in FACTORS), length)
    elif experiment == "max_batch":
        default = SMOKE_BUDGETS if smoke else MEMORY_BUDGETS
        budgets = read_numbers("memory_budget_gib", settings.memory_budget_gib, default, float)
        # To the very limit: the question is what fits, not what is wise for a long run.
        length = "--adjust_batch_size true --search_margin 0" + (" --max_batch_size 64" if smoke else "")
        length += " --max_steps 12 --tracked_steps 3 --measured_steps 6 --epochs 12 --evaluate_on none"
        for (name, flags, words), budget in itertools.product(MAX_BATCH_CASES, budgets):
            whole = is_whole_card(budget, device_memory_gib)
            limit = "" if whole else f"--memory_budget_gib {budget:g}"
            words = f"{words}; {f'the whole card of {device_memory_gib:.1f}' if whole else f'{budget:g}'} GiB"
            add(f"{name}-{budget:g}-gib", words, flags, length, limit)
    else:
        seeds = read_numbers("seeds", settings.seeds, "0,1,2", int)
        updates = settings.updates or (8 if smoke else None)
        tokens = batch(125) * (128 if smoke else 256)
        length = "--evaluate_on test" + (" --tracked_steps 2 --measured_steps 4" if smoke else "")
        for (name, flags, words), seed in itertools.product(QUALITY_CASES, seeds):
            steps = "" if updates is None else f"--max_steps {updates}"
            update = f"--batch_size {batch(125)} --tokens_per_update {tokens}"
            add(f"{name}-seed-{seed}", words, flags, update, length, steps, f"--seed {seed}")
        for name, flags, words in CONFOUNDED_CASES:
            sequences = batch(int(name.rpartition("-")[2]))
            steps = "" if updates is None else f"--max_steps {max(1, updates * batch(125) // sequences)}"
            add(name, words, flags, f"--batch_size {sequences}", length, steps, "--seed 0")
    return cases


def is_whole_card(budget: float, device_memory_gib: float | None) -> bool:
    """Whether a budget means all of a card that is sold under it: 80 GB are 80e9 bytes at least, 74.5 GiB."""
    return device_memory_gib is not None and budget * 1e9 / 2**30 <= device_memory_gib < budget


def all_combinations(factors: Sequence[str]) -> list[frozenset[str]]:
    """The 2^k sets of factors that are on; the first factor changes fastest."""
    switches = itertools.product((False, True), repeat=len(factors))
    return [frozenset(itertools.compress(factors, reversed(on))) for on in switches]


def combination_name(on: frozenset[str], factors: Sequence[str]) -> str:
    """bf16+flash, in the order of the factors; baseline if nothing is on."""
    return "+".join(name for name in factors if name in on) or "baseline"
