"""The vision transformer's training step beside vit-pytorch's SimpleViT; what kernels, DeCAtt and tokens cost in it.

    python vit_benchmark.py                             all questions (tiny sizes without a GPU, about a minute)
    python vit_benchmark.py --questions peer            the peer alone
    python vit_benchmark.py --questions kernels,decatt --backends sdpa_efficient,short

peer: SimpleViT (simple_vit_peer.py) and this lab's model with the same weights, on the same images. One step = cutting
patches, forward, cross-entropy, backward, fused AdamW; nothing is augmented or clipped. Before a variant is timed, its
logits and gradients are held against the peer's in fp64: an error at most twice the peer's own in the same precision,
or it is `changed` and gets no time. The package has textbook attention; its shape with PyTorch's fused kernels stands
beside it. The peer's linear layers of attention have no bias: ours are set to zero. It cuts a patch as (row, column,
channel), we as (channel, row, column), so the weights that meet a patch's numbers are permuted. Under autocast its
norms return fp32 and so does every sum after them: its residual stream is fp32, ours has 16 bits. Its positions are a
buffer here; the package moves them to the GPU in every step.

kernels: the model of 4.2 M parameters with each attention backend, 65 tokens with the class token, and the two fastest
with 64 (pool mean), because a 65th token does not fit into a tile of 64. Held against the textbook model in fp64 in the
same way.

decatt: that model with DeCAtt's term in no, some and all layers: what a step costs more.

tokens: a step at several numbers of tokens, and the mixed-resolution tokeniser alone. `part_of_step` is its time as a
part of itself and the step together; the goal is at most 10 %.

On a GPU compiled steps are timed twice: launched, and recorded as a CUDA graph, which is free of the host's launches.
Peaks are those of one variant: what other variants keep on the device is left out.

When it does not help: times of another GPU do not follow from these, and in a training run augmentation comes on top.

Source: https://github.com/lucidrains/vit-pytorch (SimpleViT); Beyer et al. 2022, Better plain ViT baselines for
ImageNet-1k, arXiv 2205.01580.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attention_support import BACKENDS, FULL, choose_backend, unsupported_reason
from cuda_graphs import RecordedStep
from cuda_graphs import unsupported_reason as cuda_graphs_refusal
from mixed_resolution import SCORERS, ScorerNetwork, resize, scores, tokenize
from precision import AUTOCAST_DTYPES, set_precision
from quadtree import SIZES, quadtree, valid_counts
from simple_vit_peer import IMAGE_SIZE, NUM_CLASSES, OnImages, SimpleViT, our_peer
from technique_bench import Study, interleaved, middle
from utils import SettingsError, parse_settings, read_names, read_rising, run_script, setting
from vit import MODEL_SIZES, ViT, ViTConfig, vit_config
from vit_measure import DECATT_WEIGHT, RECORDED, Gate, Variant, free, run_variants

QUESTIONS = {"peer": "peer", "kernels": "kernels", "decatt": "decatt_step", "tokens": "tokens"}  # -> folder
PEER_KERNELS = ("textbook", "sdpa", "sdpa_efficient")  # the package's, PyTorch's choice, and the fastest of PyTorch's
MIXED_SIZE, MOST_PATCHES = 2 * IMAGE_SIZE, 1024  # image that is cut into mixed tokens; patches of an image
GOAL = 0.1  # the tokeniser's part of a step
PEER_SIZES = {
    "anchor": {"num_layers": 6, "embedding_dim": 384, "num_heads": 6, "mlp_dim": 768},
    "tiny": {"num_layers": 2, "embedding_dim": 32, "num_heads": 2, "mlp_dim": 64},
}


# fmt: off
@dataclass
class Settings:
    """Settings of `python vit_benchmark.py`."""

    questions: str = setting(",".join(QUESTIONS), f"some of {', '.join(QUESTIONS)}")
    batch_size: int | None = setting(None, "images in a batch (default: 512, without a GPU 4)")
    peer_size: str | None = setting(None, "shape of `peer` (default: anchor, without a GPU tiny)", list(PEER_SIZES))
    model_size: str | None = setting(None, "shape elsewhere (default: small, without a GPU tiny)", list(MODEL_SIZES))
    precision: str | None = setting(None, "default: bf16, without a GPU fp32", ["fp32", "tf32", "bf16"])
    backends: str | None = setting(None, f"kernels of peer and kernels, some of {', '.join(BACKENDS)} (default: eager "
                                         "and the fused ones for few tokens; what cannot run here is noted)")
    use_compile: bool | None = setting(None, "compiled variants (default: with a GPU)")
    use_cuda_graphs: bool | None = setting(None, "compiled variants once more as CUDA graphs (default: with a GPU)")
    token_counts: str = setting("34,36,37,49,64", "patches of an image, rising, for the question tokens")
    rounds: int = setting(5, "measurements of each variant, in turn")
    repeats: int | None = setting(None, "timed steps of a measurement (default: 10, without a GPU 2)")
    output_folder: str = setting("outputs", "folder of all results")
# fmt: on


# --------------------------------------------------------------------------------------------------------------------
# What every question needs
# --------------------------------------------------------------------------------------------------------------------


def make_images(settings: Settings, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (batch, 3, 32, 32), smooth with some noise, and labels (batch,)."""
    generator = torch.Generator().manual_seed(0)
    smooth = resize(torch.randn(settings.batch_size, 3, 8, 8, generator=generator), IMAGE_SIZE)
    images = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return images.to(device), torch.randint(NUM_CLASSES, (len(images),), generator=generator).to(device)


def refusal(settings: Settings, device: torch.device, backend: str, config: ViTConfig) -> str | None:
    dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)
    options = {"causal": False, "tokens": config.sequence_length}
    return unsupported_reason(backend, device, dtype, FULL, config.head_dim, **options)


def default_backend(settings: Settings, device: torch.device, config: ViTConfig) -> str:
    dtype = AUTOCAST_DTYPES.get(settings.precision, torch.float32)
    options = {"tokens": config.sequence_length, "causal": False, "packed": True}
    return choose_backend(device, dtype, FULL, config.head_dim, **options)[0]


def fastest(rows: list[dict[str, Any]]) -> list[str]:
    """Backends of the rows that were timed (recorded ones if there are), the fastest first; the peer's have none."""
    last = rows[-1]["recorded"]
    timed = [row for row in rows if row["ms"] and row["backend"] and row["recorded"] == last]
    return [row["backend"] for row in sorted(timed, key=lambda row: row["ms"])]


# --------------------------------------------------------------------------------------------------------------------
# The questions
# --------------------------------------------------------------------------------------------------------------------


def ask_peer(study: Study, settings: Settings, device: torch.device, backends: list[str]) -> dict[str, Any]:
    """SimpleViT and this lab's model with every backend; after compiled ones uncompiled only the fastest of them."""
    shape, batch = PEER_SIZES[settings.peer_size], make_images(settings, device)
    config = vit_config(**shape, pool="mean")
    stream = str(AUTOCAST_DTYPES.get(settings.precision, torch.float32)).removeprefix("torch.")
    gate = Gate(lambda: SimpleViT(**shape), settings.precision, device, batch)
    for compiled in (True, False) if settings.use_compile else (False,):
        word, variants = ", compiled" if compiled else "", []
        for kernel in PEER_KERNELS:
            make = lambda kernel=kernel: SimpleViT(**shape, kernel=kernel)  # noqa: E731
            facts = {"model": "SimpleViT", "backend": None, "residual_stream": "float32"}
            refused = None if kernel == "textbook" else refusal(settings, device, kernel, config)
            variants.append(Variant(f"SimpleViT, {kernel}{word}", make, batch, compiled, refused, facts))
        for backend in backends:
            make = lambda backend=backend: our_peer(shape, backend)  # noqa: E731
            facts = {"model": "this lab", "backend": backend, "residual_stream": stream}
            refused = refusal(settings, device, backend, config)
            variants.append(Variant(f"this lab, {backend}{word}", make, batch, compiled, refused, facts))
        rows = run_variants(study, settings, device, variants, f"SimpleViT, textbook{word}", gate)
        backends = fastest(rows)[:1]
    return {"peer_error": gate.plain_error, "shape": shape}


def ask_kernels(study: Study, settings: Settings, device: torch.device, backends: list[str]) -> dict[str, Any]:
    """The model with a class token and every backend, then the two fastest without one."""
    batch, word = make_images(settings, device), ", compiled" if settings.use_compile else ""
    errors = {}
    for pool in ("class", "mean"):
        config = vit_config(settings.model_size, pool=pool, num_classes=NUM_CLASSES)
        tokens = config.sequence_length

        def make(backend: str, config: ViTConfig = config) -> OnImages:
            return OnImages(replace(config, attention_backend=backend))

        gate = Gate(lambda make=make: make("eager"), settings.precision, device, batch)
        errors[tokens] = gate.plain_error
        variants = [
            Variant(
                f"{backend}, {tokens} tokens{word}",
                lambda backend=backend, make=make: make(backend),
                batch,
                settings.use_compile,
                refusal(settings, device, backend, config),
                {"backend": backend, "pool": pool, "tokens": tokens},
            )
            for backend in backends
        ]
        rows = run_variants(study, settings, device, variants, variants[0].name if variants else "", gate)
        backends = fastest(rows)[:2]
        del gate
    return {"eager_error": errors, "model_size": settings.model_size}


def ask_decatt(study: Study, settings: Settings, device: torch.device) -> dict[str, Any]:
    """A step with DeCAtt's term in no, some and all layers, textbook and the default fused attention."""
    batch = make_images(settings, device)
    whole = vit_config(settings.model_size, num_classes=NUM_CLASSES)
    counts = (0, max(1, whole.num_layers // 4), whole.num_layers)
    for compiled in (False, True) if settings.use_compile else (False,):
        for backend in dict.fromkeys(["eager", default_backend(settings, device, whole)]):
            start, variants = f"{backend}{', compiled' if compiled else ''}, DeCAtt in ", []
            for count in counts:
                config = replace(whole, attention_backend=backend, decorrelated_layers=count)
                make = lambda config=config: OnImages(config)  # noqa: E731
                facts = {"backend": backend, "decorrelated_layers": count}
                variants.append(Variant(f"{start}{count} layers", make, batch, compiled, None, facts))
            rows = run_variants(study, settings, device, variants, variants[0].name)
            for row in rows:
                without = next(other for other in rows if other["recorded"] == row["recorded"])
                times = zip(row["ms_of_rounds"], without["ms_of_rounds"], strict=False)
                row["extra_ms_of_rounds"] = [round(a - b, 4) for a, b in times if a is not None and b is not None]
                known = None not in (row["ms"], without["ms"])
                row["extra_ms"] = round(row["ms"] - without["ms"], 4) if known else None
                row["extra_mib"] = None if row["saved_gib"] is None else round(-1024 * row["saved_gib"], 2)
    return {"model_size": settings.model_size, "decatt_weight": DECATT_WEIGHT}


def mixed_counts(counts: list[int]) -> list[int]:
    """Those numbers of patches that a quadtree can have."""
    possible = valid_counts(MIXED_SIZE, *SIZES[MIXED_SIZE])
    return [count for count in counts if count in possible]


def ask_tokens(study: Study, settings: Settings, device: torch.device, counts: list[int]) -> dict[str, Any]:
    """Steps at several numbers of tokens, then the tokeniser alone at the smallest and largest that a tree can have."""
    images, labels = make_images(settings, device)
    word, variants = ", compiled" if settings.use_compile else "", []
    for count in reversed(counts):  # the largest is what the others are held against
        config = vit_config(settings.model_size, num_tokens=count, num_classes=NUM_CLASSES)
        config = replace(config, attention_backend=default_backend(settings, device, config))
        patches = torch.randn(len(images), count, config.patch_values, device=device)
        make = lambda config=config: ViT(config)  # noqa: E731
        facts = {"kind": "step", "patches": count, "backend": config.attention_backend}
        variants.append(
            Variant(f"step, {count} patches{word}", make, (patches, labels), settings.use_compile, None, facts)
        )
    rows = run_variants(study, settings, device, variants, variants[0].name)
    steps = {(row["recorded"], row["patches"]): row["ms"] for row in rows}

    possible = mixed_counts(counts)
    calls, facts = {}, {}
    modes = (False, True) if settings.use_compile and settings.use_cuda_graphs else (False,)
    for recorded in modes:
        for count in sorted({possible[0], possible[-1]}):
            for scorer in SCORERS:
                name = f"tokeniser {scorer}, {count} tokens{word}{RECORDED if recorded else ''}"
                call = make_tokeniser(settings, device, images, scorer, count)
                calls[name] = (RecordedStep(call) if recorded else call, ())
                facts[name] = {"kind": "tokeniser", "scorer": scorer, "patches": count, "image_size": MIXED_SIZE}
                facts[name] |= {"recorded": recorded, "step_ms": steps[recorded, count]}
                calls[name][0]()
    options = {"rounds": settings.rounds, "repeats": settings.repeats, "compiled": settings.use_compile}
    for name, rounds in interleaved(calls, device, **options).items():
        cost, step = middle(rounds), facts[name]["step_ms"]
        if facts[name]["recorded"]:
            cost = replace(cost, start_gib=None, peak_gib=None)  # a replay allocates nothing
        known = None not in (cost.ms, step)
        part = round(cost.ms / (cost.ms + step), 4) if known else None
        study.add(name, cost, note=f"{part:.1%} of tokeniser and step" if known else "")
        study.rows[-1] |= {"compiled": settings.use_compile, "batch_size": len(images), **facts[name]}
        study.rows[-1] |= {
            "ms_of_rounds": [row.ms for row in rounds],
            "images_per_s": None if cost.ms is None else round(1000 * len(images) / cost.ms, 1),
            "part_of_step": part,
            "within_goal": part <= GOAL if known else None,
        }
    free(device)
    return {"model_size": settings.model_size, "goal": GOAL}


def make_tokeniser(
    settings: Settings, device: torch.device, images: torch.Tensor, scorer: str, count: int
) -> Callable[[], torch.Tensor]:
    """What vit_fit.py does with a batch: enlarge, score, cut; random numbers are drawn outside of compiled code."""
    tree = quadtree(MIXED_SIZE, num_tokens=count)
    network = ScorerNetwork(NUM_CLASSES).to(device).eval() if scorer == "trained" else None
    shapes = [(len(images), (tree.image_size // side) ** 2) for side in tree.sizes if side > tree.min_patch]

    def cut_tokens(images: torch.Tensor, importances: list[torch.Tensor] | None) -> Any:
        images = resize(images, tree.image_size)
        if importances is None:
            importances = scores(images, tree, scorer, network=network)
        return tokenize(images, tree, importances)

    called = torch.compile(cut_tokens, dynamic=False, fullgraph=True) if settings.use_compile else cut_tokens

    def call() -> torch.Tensor:
        drawn = [torch.rand(shape, device=device) for shape in shapes] if scorer == "random" else None
        return called(images, drawn).patches

    return call


def read_settings() -> tuple[Settings, torch.device, list[str], list[str], list[int]]:
    """Settings with defaults filled in, the device, the questions, the backends and the numbers of patches.

    Raises:
        SettingsError: values out of range, unknown questions or backends.
    """
    settings = parse_settings(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    defaults = {"batch_size": (4, 512), "peer_size": ("tiny", "anchor"), "model_size": ("tiny", "small")}
    defaults |= {"precision": ("fp32", "bf16"), "use_compile": (False, True), "use_cuda_graphs": (False, True)}
    defaults |= {"repeats": (2, 10)}
    defaults |= {"backends": ("eager,sdpa,short", "eager,sdpa_efficient,sdpa_cudnn,flash_attn,short")}
    for name, values in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, values[gpu])
    for name in ("batch_size", "rounds", "repeats"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.use_cuda_graphs and not settings.use_compile:
        raise SettingsError("--use_cuda_graphs true records compiled variants; leave --use_compile false out")
    if settings.use_cuda_graphs and (reason := cuda_graphs_refusal(device)) is not None:
        raise SettingsError(reason)
    questions = read_names("questions", settings.questions, list(QUESTIONS))
    backends = read_names("backends", settings.backends, list(BACKENDS))
    counts = read_rising("token_counts", settings.token_counts, most=MOST_PATCHES)
    if "tokens" in questions and not mixed_counts(counts):
        raise SettingsError(
            f"--token_counts {settings.token_counts} has no number of mixed tokens, which the tokeniser is timed with; "
            "add one such as 49"
        )
    set_precision(settings.precision, device)
    return settings, device, questions, backends, counts


def main() -> int:
    """Ask the questions, print the tables and leave outputs/vit/<question>/run.json; 1 if a variant was wrong."""
    settings, device, questions, backends, counts = read_settings()
    print(f"batch {settings.batch_size}, {settings.precision}, {settings.rounds} rounds of {settings.repeats} steps")
    status = 0
    for question in questions:
        study = Study(QUESTIONS[question], settings, device, experiment="vit")
        if question == "peer":
            more = ask_peer(study, settings, device, backends)
        elif question == "kernels":
            more = ask_kernels(study, settings, device, backends)
        elif question == "decatt":
            more = ask_decatt(study, settings, device)
        else:
            more = ask_tokens(study, settings, device, counts)
        status |= study.finish(**more) | any(row["status"] == "failed" for row in study.rows)
    return status


if __name__ == "__main__":
    run_script(main)
