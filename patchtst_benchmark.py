"""PatchTST's training step beside that of the transformers library, and from how many tokens on fused attention pays.

    python patchtst_benchmark.py                        all questions (tiny sizes without a GPU, about a minute)
    python patchtst_benchmark.py --questions peer       the peer alone
    python patchtst_benchmark.py --questions break_even --precision fp32

peer: this lab's model and transformers' PatchTSTForPrediction with the same weights, on the same batch, one step =
forward, MSE, backward, fused AdamW. Before anything is timed, forecasts and gradients of both are compared with those
of the library's model in fp64: an error at most twice that of the library's own in the same precision. What is faster
here: q, k and v are one matrix product instead of three, the residual stream stays in 16 bits under autocast (the
library adds fp32 positions and so carries fp32 through every layer), BatchNorm reads tokens row by row.

break_even: the same step with textbook and with fused attention at a fixed number of tokens in a batch and a rising
number of tokens in a sequence: windows get longer and fewer. Measured in turn, several rounds; faster is faster in
every round. Without the compiler a fused kernel also saves launches and passes over memory that the compiler saves
textbook attention, too; --compile_break_even true asks the compiled step as well.

pruned_step: the step of the whole model beside those of models with fewer heads, masked and cut, from the same weights.

Source: https://huggingface.co/docs/transformers/model_doc/patchtst
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from attention import prepare_for_compile, profiled_kernel
from attention_support import BACKENDS, FULL, choose_backend, choose_flash_backend, unsupported_reason
from head_pruning import MODES, attention_layers, remove_heads, static_choice
from optimizers import make_optimizer
from patchtst import PatchTST, flops_per_window, patchtst_config
from precision import AUTOCAST_DTYPES, autocast, set_precision
from technique_bench import Cost, Study, clearly_faster, compare, interleaved, middle, time_difference
from utils import SettingsError, count_parameters, parse_settings, read_names, read_rising, run_script, setting

QUESTIONS = ("peer", "break_even", "pruned_step")


# fmt: off
@dataclass
class Settings:
    """Settings of `python patchtst_benchmark.py`; the shape is that of the course project's configuration."""

    questions: str = setting("peer,break_even,pruned_step", f"some of {', '.join(QUESTIONS)}")
    batch_size: int | None = setting(None, "windows in a batch (default: 512, without a GPU 4)")
    channels: int = setting(7, "channels of a window")
    context_length: int | None = setting(None, "rows that the model sees (default: 512, without a GPU 96)")
    horizon: int = setting(96, "rows that it forecasts")
    patch_length: int = setting(12, "rows of a patch; patches do not overlap")
    embedding_dim: int | None = setting(None, "width (default: 128, without a GPU 32)")
    num_heads: int | None = setting(None, "attention heads (default: 16, without a GPU 4)")
    ffn_dim: int | None = setting(None, "width inside the MLP (default: 512, without a GPU 64)")
    precision: str | None = setting(None, "default: bf16, without a GPU fp32", ["fp32", "tf32", "bf16"])
    backends: str | None = setting(None, f"kernels beside eager, some of {', '.join(BACKENDS)} (default: flash, auto)")
    use_compile: bool | None = setting(None, "peer, pruned_step: compiled variants as well (default: with a GPU)")
    compile_break_even: bool = setting(False, "ask the break-even of the compiled step, too: a minute a size")
    break_even_tokens: str | None = setting(None, "tokens in a sequence, rising (default: 4 to 1024, no GPU 4 to 64)")
    rounds: int = setting(5, "measurements of each variant, in turn")
    repeats: int = setting(10, "timed steps of a measurement")
    output_folder: str = setting("outputs", "folder of all results")
# fmt: on


# --------------------------------------------------------------------------------------------------------------------
# The two models
# --------------------------------------------------------------------------------------------------------------------


def transformers_model(settings: Settings, implementation: str) -> nn.Module:
    """PatchTSTForPrediction of the settings' shape, no dropout, flattened head (the official one).

    Args:
        implementation: eager or sdpa.
    """
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=settings.channels,
        context_length=settings.context_length,
        patch_length=settings.patch_length,
        patch_stride=settings.patch_length,
        prediction_length=settings.horizon,
        d_model=settings.embedding_dim,
        num_attention_heads=settings.num_heads,
        ffn_dim=settings.ffn_dim,
        pooling_type=None,
        scaling="std",
        attn_implementation=implementation,
    )
    return PatchTSTForPrediction(config)


def our_model(settings: Settings, backend: str) -> PatchTST:
    """The lab's model of the same shape, no dropout."""
    config = patchtst_config(
        "transformers",
        context_length=settings.context_length,
        horizon=settings.horizon,
        patch_length=settings.patch_length,
        patch_stride=settings.patch_length,
        embedding_dim=settings.embedding_dim,
        num_heads=settings.num_heads,
        ffn_dim=settings.ffn_dim,
        head_dropout=0.0,
        attention_backend=backend,
    )
    return PatchTST(config)


def parameter_pairs(ours: PatchTST, theirs: nn.Module) -> list[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Which parameters are the same numbers: (name here, ours, theirs), where ours are theirs one below the other."""
    encoder = theirs.model.encoder
    embedding = encoder.embedder.input_embedding
    pairs = [("embedding.weight", ours.embedding.weight, [embedding.weight])]
    pairs.append(("embedding.bias", ours.embedding.bias, [embedding.bias]))
    for place, (own, other) in enumerate(zip(ours.layers, encoder.layers, strict=True)):
        attention = other.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for kind in ("weight", "bias"):
            pairs += [
                (f"{place}.qkv.{kind}", getattr(own.attention.qkv, kind), [getattr(p, kind) for p in projections]),
                (f"{place}.output.{kind}", getattr(own.attention.output, kind), [getattr(attention.out_proj, kind)]),
                (f"{place}.expand.{kind}", getattr(own.expand, kind), [getattr(other.ff[0], kind)]),
                (f"{place}.contract.{kind}", getattr(own.contract, kind), [getattr(other.ff[3], kind)]),
            ]
            for name, norm in (("attention_norm", other.norm_sublayer1), ("mlp_norm", other.norm_sublayer3)):
                norm = getattr(norm, "batchnorm", norm)
                pairs.append((f"{place}.{name}.{kind}", getattr(getattr(own, name), kind), [getattr(norm, kind)]))
    pairs.append(("head.weight", ours.head.weight, [theirs.head.projection.weight]))
    pairs.append(("head.bias", ours.head.bias, [theirs.head.projection.bias]))
    return pairs


@torch.no_grad()
def copy_weights(ours: PatchTST, theirs: nn.Module) -> None:
    """Give ours the weights, positions and running statistics of transformers' model."""
    for _, own, others in parameter_pairs(ours, theirs):
        own.copy_(torch.cat(others))
    ours.positions.copy_(theirs.model.encoder.positional_encoder.position_enc)
    for own, other in zip(ours.layers, theirs.model.encoder.layers, strict=True):
        for name, norm in (("attention_norm", other.norm_sublayer1), ("mlp_norm", other.norm_sublayer3)):
            mine = getattr(own, name)
            if isinstance(mine, nn.BatchNorm1d):
                mine.running_mean.copy_(norm.batchnorm.running_mean)
                mine.running_var.copy_(norm.batchnorm.running_var)


class Trial:
    """A model with its optimizer and a batch; `step` trains on it once."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device, batch: tuple[torch.Tensor, ...]):
        self.model, self.precision, self.device, self.batch = model.to(device), settings.precision, device, batch
        self.called: Callable[..., Any] = self.model
        self.optimizer = make_optimizer(
            "adamw", model.parameters(), learning_rate=1e-4, weight_decay=0.0, device=device
        )
        model.register_buffer("batch_inputs", batch[0], persistent=False)  # so that the tracker sees them without a GPU
        model.register_buffer("batch_targets", batch[1], persistent=False)

    def compile(self) -> float:
        """Compile the model (with its loss, where it computes it itself); returns the seconds of the first step."""
        prepare_for_compile()
        self.called = torch.compile(self.model, dynamic=False)
        begin = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - begin, 2)

    def loss(self) -> torch.Tensor:
        inputs, targets = self.batch
        with autocast(self.precision, self.device):
            if isinstance(self.model, PatchTST):
                return F.mse_loss(self.called(inputs), targets)
            return self.called(past_values=inputs, future_values=targets).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forecast(self) -> torch.Tensor:
        """(batch, horizon, channels) in training mode, so that BatchNorm takes the batch's own statistics.

        Of what is timed: compiled if the trial is.
        """
        with autocast(self.precision, self.device):
            if isinstance(self.model, PatchTST):
                return self.called(self.batch[0])
            return self.model(self.batch[0]).prediction_outputs

    def kernel(self) -> str:
        return profiled_kernel(self.step, compiled=self.called is not self.model)


def results_to_compare(trial: Trial, pairs: list[tuple[str, torch.Tensor, list[torch.Tensor]]]) -> list[torch.Tensor]:
    """The forecast and every parameter's gradient for the MSE, in the order of the pairs; theirs joined as ours are."""
    trial.model.zero_grad(set_to_none=True)
    forecast = trial.forecast()
    F.mse_loss(forecast, trial.batch[1]).backward()
    ours = isinstance(trial.model, PatchTST)
    gradients = [own.grad.clone() if ours else torch.cat([other.grad for other in others]) for _, own, others in pairs]
    trial.model.zero_grad(set_to_none=True)
    return [forecast.detach(), *gradients]


def check_parity(
    trial: Trial, settings: Settings, device: torch.device, batch: tuple[torch.Tensor, ...]
) -> tuple[str, float]:
    """Our model in `trial` against transformers' with the same weights: exactness and error as `compare` has them."""
    torch.manual_seed(0)
    theirs = Trial(transformers_model(settings, "eager"), settings, device, batch)
    exact_settings = dataclasses.replace(settings, precision="fp32")  # no autocast
    exact = transformers_model(settings, "eager").double()
    exact.load_state_dict(theirs.model.state_dict())
    exact = Trial(exact, exact_settings, device, tuple(part.double() for part in batch))
    copy_weights(trial.model, theirs.model)
    found = results_to_compare(trial, parameter_pairs(trial.model, theirs.model))
    plain = results_to_compare(theirs, parameter_pairs(trial.model, theirs.model))
    reference = results_to_compare(exact, parameter_pairs(trial.model, exact.model))
    # The bias of k has no gradient but rounding: softmax ignores what is added to all scores of a query.
    return compare(without_key_bias(found, trial), without_key_bias(plain, trial), without_key_bias(reference, trial))


def without_key_bias(results: list[torch.Tensor], trial: Trial) -> list[torch.Tensor]:
    width = trial.model.config.embedding_dim
    return [
        torch.cat([value[:width], value[2 * width :]]) if value.dim() == 1 and len(value) == 3 * width else value
        for value in results
    ]


# --------------------------------------------------------------------------------------------------------------------
# The questions
# --------------------------------------------------------------------------------------------------------------------


def make_batch(settings: Settings, batch_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random walks with a wave: inputs (batch, context_length, channels), targets (batch, horizon, channels)."""
    generator = torch.Generator().manual_seed(0)
    rows = settings.context_length + settings.horizon
    steps = torch.randn(batch_size, rows, settings.channels, generator=generator)
    series = 0.1 * steps.cumsum(1) + torch.sin(2 * torch.pi * torch.arange(rows) / 24)[None, :, None]
    inputs, targets = series.split([settings.context_length, settings.horizon], dim=1)
    return inputs.contiguous().to(device), targets.contiguous().to(device)


def free(device: torch.device) -> None:
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ask_peer(study: Study, settings: Settings, device: torch.device, backends: list[str]) -> list[dict[str, Any]]:
    """Rows of both models; returns the details of every round."""
    batch = make_batch(settings, settings.batch_size, device)
    details = []
    for compiled in (False, True) if settings.use_compile else (False,):
        trials: dict[str, Trial] = {}
        suffix = ", compiled" if compiled else ""
        for implementation in ("eager", "sdpa"):
            torch.manual_seed(0)
            model = transformers_model(settings, implementation)
            trials[f"transformers, {implementation}{suffix}"] = Trial(model, settings, device, batch)
        for backend in ["eager", *backends]:
            trials[f"this lab, {backend}{suffix}"] = Trial(our_model(settings, backend), settings, device, batch)
        kernels, seconds, parity = {}, {}, {}
        for name, trial in trials.items():
            seconds[name] = trial.compile() if compiled else None
            kernels[name] = trial.kernel()
            if isinstance(trial.model, PatchTST):  # last, because it sets the weights of both to the same numbers
                parity[name] = check_parity(trial, settings, device, batch)
        steps = {name: (trial.step, (trial.model, trial.optimizer)) for name, trial in trials.items()}
        options = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": compiled}
        costs = interleaved(steps, device, **options)
        base = f"transformers, eager{suffix}"
        for name, rounds in costs.items():
            exactness, error = parity.get(name, (None, None))
            study.add(
                name,
                middle(rounds),
                exactness=exactness,
                error=error,
                baseline=None if name == base else base,
                note=kernels[name],
            )
            times = [cost.ms for cost in rounds]
            details.append({"variant": name, "ms": times, "compile_s": seconds[name], "kernel": kernels[name]})
        del trials, steps
        free(device)
    return details


def ask_break_even(
    study: Study, settings: Settings, device: torch.device, backends: list[str], sizes: list[int]
) -> list[dict[str, Any]]:
    """From how many tokens of a sequence on each kernel is faster than eager; returns every measured time."""
    total = settings.batch_size * (settings.context_length // settings.patch_length)
    details: list[dict[str, Any]] = []
    for compiled in (False, True) if settings.compile_break_even else (False,):
        known: dict[int, dict[str, list[Cost]]] = {}
        dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)

        def runs(name: str, tokens: int, dtype: torch.dtype = dtype) -> bool:
            head_dim = settings.embedding_dim // settings.num_heads
            return unsupported_reason(name, device, dtype, FULL, head_dim, causal=False, tokens=tokens) is None

        def at(tokens: int, compiled: bool = compiled, known: dict = known) -> dict[str, list[Cost]]:
            if tokens not in known:
                own = dataclasses.replace(settings, context_length=tokens * settings.patch_length)
                windows = max(1, total // tokens)
                batch = make_batch(own, windows, device)
                names = [name for name in ("eager", *backends) if runs(name, tokens)]
                trials = {name: Trial(our_model(own, name), own, device, batch) for name in names}
                if compiled:
                    for trial in trials.values():
                        trial.compile()
                steps = {name: (trial.step, (trial.model, trial.optimizer)) for name, trial in trials.items()}
                options = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": compiled}
                known[tokens] = interleaved(steps, device, **options)
                del trials, steps
                free(device)
                row = {"tokens": tokens, "windows": windows, "compiled": compiled}
                row["ms"] = {name: [cost.ms for cost in costs] for name, costs in known[tokens].items()}
                row["peak_gib"] = {name: middle(costs).peak_gib for name, costs in known[tokens].items()}
                details.append(row)
            return known[tokens]

        words = "compiled step" if compiled else "step"
        for backend in backends:
            study.ask(
                f"{words} with {backend} is faster than with eager",
                "tokens",
                lambda tokens, backend=backend: clearly_faster(at(tokens)[backend], at(tokens)["eager"]),
                [tokens for tokens in sizes if runs(backend, tokens)],
                # Every new size is compiled for a minute, so that the compiled answer stays on the grid.
                max(sizes) if compiled else 8,
            )
    return sorted(details, key=lambda row: (row["compiled"], row["tokens"]))


def ask_pruning(study: Study, settings: Settings, device: torch.device, backend: str) -> list[dict[str, Any]]:
    """Rows of the whole model and of those with fewer heads, and the same measured again; returns every round."""
    batch, heads = make_batch(settings, settings.batch_size, device), settings.num_heads
    cases = {"whole": (0, "structural"), "whole, again": (0, "structural")}
    for count in sorted({max(1, heads * 5 // 16), heads // 2}):
        cases |= {
            f"{count} of {heads} heads {word}": (count, mode)
            for word, mode in (("cut", MODES[0]), ("masked", MODES[1]))
        }
    details = []
    for compiled in (False, True) if settings.use_compile else (False,):
        trials = {}
        for name, (count, mode) in cases.items():
            torch.manual_seed(0)
            model = our_model(settings, backend).to(device)
            for place, layer in enumerate(attention_layers(model)):
                remove_heads(layer, static_choice("static_random", heads, count, place, 0), mode=mode)
            trials[name] = Trial(model, settings, device, batch)
        seconds = {name: trial.compile() if compiled else None for name, trial in trials.items()}
        steps = {name: (trial.step, (trial.model, trial.optimizer)) for name, trial in trials.items()}
        options = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": compiled}
        costs = interleaved(steps, device, **options)
        suffix = ", compiled" if compiled else ""
        for name, rounds in costs.items():
            model = trials[name].model
            size = {"parameters": count_parameters(model), "gflop": flops_per_window(model, settings.channels) / 1e9}
            note = f"{size['parameters']:,} parameters, {size['gflop']:.3f} GFLOP a window"
            base = None if name == "whole" else f"whole{suffix}"
            if base is not None:
                note = f"{time_difference(rounds, costs['whole'])}; {note}"
            study.add(f"{name}{suffix}", middle(rounds), baseline=base, note=note)
            times = [cost.ms for cost in rounds]
            details.append({"variant": name, "compiled": compiled, "ms": times, "compile_s": seconds[name], **size})
        del trials, steps
        free(device)
    return details


def read_settings() -> tuple[Settings, torch.device, list[str], list[str], list[int]]:
    """Settings with defaults filled in, the device, the questions, the kernels and the tokens of the break-even.

    Raises:
        SettingsError: values out of range, or a kernel that cannot run here.
    """
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    defaults = {"batch_size": (4, 512), "context_length": (96, 512), "embedding_dim": (32, 128)}
    defaults |= {
        "num_heads": (4, 16),
        "ffn_dim": (64, 512),
        "precision": ("fp32", "bf16"),
        "use_compile": (False, True),
    }
    defaults |= {"break_even_tokens": ("4,8,16,32,64", "4,8,16,32,42,64,128,256,512,1024")}
    for name, values in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values[gpu])
    for name in ("batch_size", "channels", "horizon", "patch_length", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    questions = read_names("questions", settings.questions, QUESTIONS)
    sizes = read_rising("break_even_tokens", settings.break_even_tokens)
    set_precision(settings.precision, device)
    dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)
    model = our_model(settings, "eager")
    head_dim, tokens = model.config.head_dim, model.config.num_patches
    if settings.backends is None:
        flash = choose_flash_backend(device, dtype, FULL, head_dim) if gpu and dtype != torch.float32 else "sdpa"
        options = {"tokens": tokens, "causal": False, "packed": True}
        chosen = [flash, choose_backend(device, dtype, FULL, head_dim, **options)[0]]
    else:
        chosen = settings.backends.split(",")
    for backend in chosen:
        reason = "it is unknown"
        if backend in BACKENDS:
            reason = unsupported_reason(backend, device, dtype, FULL, head_dim, causal=False, tokens=tokens)
        if reason is not None:
            raise SettingsError(f"--backends {backend} cannot run here: {reason}")
    return settings, device, questions, list(dict.fromkeys(b for b in chosen if b != "eager")), sizes


def main() -> int:
    """Ask the questions, print the tables and leave outputs/patchtst/<question>/run.json."""
    settings, device, questions, backends, sizes = read_settings()
    print(
        f"batch {settings.batch_size}, context {settings.context_length}, patches of {settings.patch_length}, "
        f"{settings.channels} channels, width {settings.embedding_dim}, {settings.num_heads} heads, "
        f"{settings.precision}; kernels {', '.join(['eager', *backends])}"
    )
    status = 0
    for question in questions:
        study = Study(question, settings, device, experiment="patchtst")
        if question == "peer":
            status |= study.finish(rounds=ask_peer(study, settings, device, backends))
        elif question == "break_even":
            status |= study.finish(times=ask_break_even(study, settings, device, backends, sizes))
        else:
            chosen = backends[-1] if backends else "eager"
            status |= study.finish(rounds=ask_pruning(study, settings, device, chosen), backend=chosen)
    return status


if __name__ == "__main__":
    run_script(main)
