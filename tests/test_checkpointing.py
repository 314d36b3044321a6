"""Gradient checkpointing: equal gradients, what runs again, what is kept, host memory, the compiler's budget."""

import functools
import gc
import json
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import checkpointing
from attention import flash_attn_error
from checkpointing import (
    METHODS,
    PreNormBlock,
    offloaded,
    run_blocks,
    saved_bytes_per_token,
    set_activation_memory_budget,
    unsupported_reason,
)
from host_offload import HostOffload
from memory_tracker import LiveTensorCounter, MemoryTracker
from precision import autocast
from utils import GIB, SettingsError

CPU = torch.device("cpu")
FLASH = "flash_attn" if flash_attn_error() is None else "sdpa_flash"


def make_blocks(num_layers=3, width=32, heads=2, dropout=0.0, backend="sdpa", device="cpu") -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(PreNormBlock(width, heads, dropout, backend) for _ in range(num_layers)).to(device)


def run(blocks, hidden_states, method, every=2):
    """`run_blocks`, with offload by its mechanism where there is no GPU."""
    if method == "offload" and not hidden_states.is_cuda:
        return offloaded(blocks, hidden_states)
    return run_blocks(blocks, hidden_states, method, every=every)


def gradients(blocks, method, precision="fp32", every=2, batch=2, tokens=16, seed=1) -> list[torch.Tensor]:
    weight = next(blocks.parameters())
    inputs = torch.randn(batch, tokens, weight.shape[-1], generator=torch.Generator().manual_seed(3)).to(weight.device)
    inputs.requires_grad_()
    blocks.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with autocast(precision, weight.device):
        hidden_states = run(blocks, inputs, method, every)
    hidden_states.float().square().mean().backward()
    return [inputs.grad, *(parameter.grad for parameter in blocks.parameters())]


def all_equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- equal gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", METHODS[1:])
def test_gradients_are_bitwise_those_of_none(method, dropout, precision):
    blocks = make_blocks(num_layers=4, dropout=dropout)
    assert all_equal(gradients(blocks, "none", precision), gradients(blocks, method, precision))


def test_other_dropout_masks_give_other_gradients():
    """Without this the test above would not notice a random state that is not restored."""
    blocks = make_blocks(dropout=0.2)
    assert not all_equal(gradients(blocks, "none", seed=1), gradients(blocks, "none", seed=2))


@pytest.mark.parametrize("method", METHODS[1:])
def test_gradients_add_up_over_two_steps(method):
    def twice(method):
        blocks = make_blocks()
        for scale in (1.0, 2.0):
            run(blocks, scale * torch.ones(2, 16, 32), method).square().mean().backward()
        return [parameter.grad for parameter in blocks.parameters()]

    assert all_equal(twice("none"), twice(method))


@pytest.mark.parametrize("method", METHODS[1:])
def test_two_forward_passes_before_their_backward_passes(method):
    def nested(method):
        blocks = make_blocks()
        first = run(blocks, torch.ones(2, 16, 32), method).square().mean()
        second = run(blocks, 2 * torch.ones(2, 16, 32), method).square().mean()
        first.backward()
        second.backward()
        return [parameter.grad for parameter in blocks.parameters()]

    assert all_equal(nested("none"), nested(method))


@pytest.mark.parametrize("method", METHODS[1:])
def test_two_forward_passes_in_one_autocast_region(method):
    """Autocast then reuses the 16-bit weights of the first, which must not confuse what is kept and what is not."""

    def shared(method):
        blocks = make_blocks()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_states = [run(blocks, scale * torch.ones(2, 16, 32), method) for scale in (1.0, 2.0)]
        sum(x.float().square().mean() for x in hidden_states).backward()
        return [parameter.grad for parameter in blocks.parameters()]

    for a, b in zip(shared("none"), shared(method), strict=True):
        assert (a - b).norm() <= 0.01 * a.norm() + 1e-6


class TwoDropouts(nn.Module):
    """An operator that draws random numbers and is kept, then a dropout that is not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        kept, _ = torch.ops.aten.native_dropout(self.linear(x), 0.5, True)
        return torch.sigmoid(nn.functional.dropout(kept.exp(), 0.5))


def test_a_kept_operator_that_draws_random_numbers(monkeypatch):
    """What attention dropout inside a fused kernel does on a GPU: skipping the operator must not shift what follows."""
    kept = ("aten.native_dropout.default",)
    monkeypatch.setattr(checkpointing, "ATTENTION_OPERATORS", kept)
    monkeypatch.setitem(checkpointing.KEPT_OPERATORS, "selective", kept)
    torch.manual_seed(0)
    blocks = nn.ModuleList(TwoDropouts() for _ in range(3))

    def of(method):
        blocks.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        run_blocks(blocks, torch.ones(4, 8), method).sum().backward()
        return [parameter.grad for parameter in blocks.parameters()]

    assert all_equal(of("none"), of("selective"))


# -- what runs again ---------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] = self.count.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def calls(method, operator, every=2, **options) -> int:
    """How often an operator runs in the forward and backward passes of 4 blocks."""
    blocks = make_blocks(num_layers=4, **options)
    with Calls() as seen:
        gradients(blocks, method, every=every)
    return seen.count.get(operator, 0)


@pytest.mark.parametrize(
    ("method", "every", "times"),
    [
        ("none", 2, 4),
        ("block", 2, 8),
        ("every_k", 2, 6),
        ("every_k", 3, 6),
        ("every_k", 4, 5),
        ("selective", 2, 4),
        ("selective_matmul", 2, 4),
        ("offload", 2, 8),
    ],
)
def test_how_often_the_attention_kernel_runs(method, every, times):
    operator = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert calls(method, operator, every, backend="sdpa_flash") == times


def test_only_selective_matmul_spares_the_matrix_products():
    """In the backward pass `block` and `selective` run three of four products again: the last one is not needed."""
    products = {method: calls(method, "aten.addmm.default") + calls(method, "aten.mm.default") for method in METHODS}
    assert products["selective_matmul"] == products["none"]
    assert products["selective"] == products["block"] == products["none"] + 3 * 4


def test_selective_matmul_runs_the_norms_again():
    operator = "aten.native_layer_norm.default"
    assert (calls("none", operator), calls("selective_matmul", operator)) == (8, 16)


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients_the_blocks_just_run(method):
    blocks, inputs = make_blocks(), torch.ones(2, 16, 32)
    expected = run_blocks(blocks, inputs, "none")
    if method == "offload":
        method = "block"
    with torch.no_grad(), Calls() as seen:
        hidden_states = run_blocks(blocks, inputs, method)
    assert torch.equal(hidden_states, expected) and not hidden_states.requires_grad
    assert seen.count["aten.native_layer_norm.default"] == 6 and "aten.detach.default" not in seen.count


# -- what is kept ------------------------------------------------------------------------------------------------------

SHAPE = {"num_layers": 6, "width": 64, "num_heads": 4}
TOKENS = 8 * 64


@functools.cache
def kept_bytes(method, every=2) -> tuple[int, int]:
    """Live bytes beyond the weights: when the backward pass begins, and at most until it has left the last MLP layer.

    At that peak the last block has been rebuilt whole, and nothing of it has been freed.
    """
    blocks = make_blocks(6, 64, 4)
    inputs = torch.randn(8, 64, 64)
    seen = []

    class Counter(LiveTensorCounter):
        armed = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if self.armed and str(func) == "aten.gelu_backward.default" and len(seen) == 1:
                seen.append(self.peak_bytes)
            return super().__torch_dispatch__(func, types, args, kwargs)

    counter = Counter()
    counter.add_all((blocks,))
    counter.add(inputs)
    weights = counter.current_bytes - inputs.nbytes  # the input of the first block counts as kept
    with counter:
        loss = run(blocks, inputs, method, every).sum()
        seen.append(counter.current_bytes)
        counter.armed, counter.peak_bytes = True, counter.current_bytes
        loss.backward()
    return seen[0] - weights, seen[1] - weights


@pytest.mark.parametrize(
    ("method", "every"),
    [("none", 2), ("block", 2), ("every_k", 2), ("every_k", 5), ("selective", 2), ("selective_matmul", 2)],
)
def test_formula_holds_against_counted_tensors(method, every):
    """fp32: bytes a token kept for the backward pass, with the last block rebuilt."""
    expected = saved_bytes_per_token(method, **SHAPE, activation_bytes=4, every=every)
    at_start, with_block = kept_bytes(method, every)
    # The last linear layer has made the gradients of its input (4 width numbers a token), its weight and its bias.
    gradients_there = 4 * 4 * 64 + 4 * (64 * 256 + 64) / TOKENS
    if method == "none" or (method == "every_k" and every == 2):  # the last of 6 blocks is not rebuilt
        assert at_start / TOKENS == pytest.approx(expected, rel=0.01)
    assert with_block / TOKENS - gradients_there == pytest.approx(expected, rel=0.01)


def test_formula_gives_the_figures_of_the_docstring():
    shape = {"num_layers": 12, "width": 768, "num_heads": 12, "activation_bytes": 2}
    figures = {method: saved_bytes_per_token(method, **shape) for method in METHODS}
    assert figures["none"] == 12 * 27_712 and figures["block"] == 11 * 3_072 + 27_712
    for method, figure in figures.items():
        line = next(line for line in checkpointing.__doc__.splitlines() if line.startswith(method))
        assert line.endswith(f" {figure:,}")


def test_formula_of_one_block_is_the_block():
    shape = {"num_layers": 1, "width": 64, "num_heads": 4, "activation_bytes": 4}
    plain = saved_bytes_per_token("none", **shape)
    assert all(saved_bytes_per_token(method, **shape) == plain for method in ("block", "selective", "offload"))


def test_order_of_the_methods_on_the_cpu():
    kept = {method: kept_bytes(method)[0] for method in METHODS}
    assert kept["none"] > kept["selective_matmul"] > kept["selective"] > kept["block"]
    assert kept["none"] > kept["every_k"] > kept["block"]


def test_peak_of_a_step_follows_the_order():
    peaks = {}
    for method in ("none", "selective_matmul", "selective", "block"):
        blocks = make_blocks(6, 64, 4)
        tracker = MemoryTracker(CPU, roots=(blocks,))
        with tracker.step(1), tracker.phase("step"):
            gradients(blocks, method, batch=8, tokens=64)
        peaks[method] = tracker.summary()["step"]["peak_allocated_gib"]
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True) and len(set(peaks.values())) == 4


# -- host memory -------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A block that notes a weak reference to the storage of every input it sees."""

    def __init__(self, seen):
        super().__init__()
        self.linear, self.seen = nn.Linear(8, 8), seen

    def forward(self, x):
        self.seen.append(weakref.ref(x.untyped_storage()))
        return torch.tanh(self.linear(x))


def test_offload_frees_the_inputs_between_forward_and_backward():
    seen = []
    blocks = nn.ModuleList(Watched(seen) for _ in range(4))
    loss = offloaded(blocks, torch.ones(2, 8) * 1).sum()
    # The last block's input stays on the device: it is needed first.
    assert [reference() is None for reference in seen] == [True, True, True, False]
    loss.backward()
    assert len(seen) == 8


def test_offload_touches_the_input_only():
    """Neither weights nor small tensors: what autograd keeps outside of it passes through unchanged."""
    offload, weight = HostOffload(CPU), torch.ones(8, 8)
    inputs = torch.ones(2, 8)
    offload.address = inputs.data_ptr()
    assert offload.pack(weight) is weight and offload.unpack(weight) is weight
    empty = torch.empty(0)
    assert offload.pack(empty) is empty
    parked = offload.pack(inputs)
    assert parked is not inputs and torch.equal(offload.unpack(parked), inputs)


def test_offload_fetches_the_next_input_while_a_block_is_rebuilt():
    offload = HostOffload(CPU)
    parked = []
    for value in (1.0, 2.0, 3.0):
        inputs = torch.full((2, 2), value)
        offload.address = inputs.data_ptr()
        parked.append(offload.pack(inputs))
    assert [p.fetched is not None for p in parked] == [False, False, False]
    assert offload.unpack(parked[2])[0, 0] == 3.0
    assert [p.fetched is not None for p in parked] == [False, True, False]
    arrived = parked[1].fetched[0]
    assert offload.unpack(parked[1]) is arrived and arrived[0, 0] == 2.0
    assert [p.fetched is not None for p in parked] == [True, False, False]


def test_offload_can_run_the_backward_pass_twice():
    def twice(method):
        blocks = make_blocks()
        loss = run(blocks, torch.ones(2, 16, 32), method).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [parameter.grad for parameter in blocks.parameters()]

    assert all_equal(twice("none"), twice("offload"))


class Fails(nn.Module):
    """A block that raises in its n-th call (None: never)."""

    def __init__(self, call):
        super().__init__()
        self.call, self.calls = call, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.call:
            raise torch.OutOfMemoryError("out of memory")
        return torch.tanh(x)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("call", [None, 1, 2], ids=["no-backward", "in-forward", "in-backward"])
def test_a_step_that_breaks_off_leaves_nothing_behind(method, call):
    blocks = make_blocks()
    expected = [gradient.clone() for gradient in gradients(blocks, "none")]
    blocks.zero_grad(set_to_none=True)
    more = nn.ModuleList([blocks[0], blocks[1], Fails(call), blocks[2]])  # every method checkpoints blocks 0 and 2
    with LiveTensorCounter() as counter:

        def broken():
            loss = run(more, torch.randn(2, 16, 32), method).square().mean()
            if call is not None:
                loss.backward()

        if call is None:
            broken()
        else:
            with pytest.raises(torch.OutOfMemoryError):
                broken()
        blocks.zero_grad(set_to_none=True)
        gc.collect()
        alive = counter.current_bytes
    assert alive <= sum(parameter.nbytes for parameter in blocks.parameters())
    assert all_equal(expected, gradients(blocks, method))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa_math", "flex"])
@pytest.mark.parametrize("method", ["selective", "selective_matmul"])
def test_selective_needs_a_fused_operator(method, backend):
    assert f"{backend} has none; take attention_backend sdpa" in unsupported_reason(method, backend, CPU)
    assert unsupported_reason("block", backend, CPU) is None


def test_selective_needs_a_fused_operator_with_dropout():
    assert "set --dropout 0" in unsupported_reason("selective", "sdpa", CPU, dropout=0.1)
    assert unsupported_reason("selective", "sdpa", CPU) is None
    assert unsupported_reason("selective", "sdpa", torch.device("cuda"), dropout=0.1) is None
    assert calls("selective", "aten._scaled_dot_product_flash_attention_for_cpu.default", dropout=0.1) == 0


def test_offload_needs_a_gpu():
    assert "needs a GPU" in unsupported_reason("offload", "sdpa", CPU)
    assert unsupported_reason("offload", "eager", torch.device("cuda")) is None
    with pytest.raises(SettingsError, match="--gradient_checkpointing: offload needs a GPU"):
        run_blocks(make_blocks(), torch.ones(2, 16, 32), "offload")


def test_wrong_methods_are_errors():
    with pytest.raises(SettingsError, match="gradient_checkpointing half is unknown; choose one of none, block"):
        run_blocks(make_blocks(), torch.ones(2, 16, 32), "half")
    with pytest.raises(SettingsError, match="--checkpoint_every must be at least 2, not 1"):
        run_blocks(make_blocks(), torch.ones(2, 16, 32), "every_k", every=1)


# -- the compiler ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    set_activation_memory_budget(None)
    torch.compiler.reset()


def test_memory_budget_of_compiled_graphs(compiler):
    """A budget of 0 keeps the graph's inputs alone; both give the gradients of the uncompiled blocks."""
    blocks = make_blocks()
    inputs = torch.randn(8, 16, 32)
    kept = {}

    def of(run_them):
        blocks.zero_grad(set_to_none=True)
        run_them(inputs).square().mean().backward()
        return [parameter.grad for parameter in blocks.parameters()]

    plain = of(lambda x: run_blocks(blocks, x, "none"))
    for budget in (1.0, 0.0):
        torch.compiler.reset()
        set_activation_memory_budget(budget)
        run_them = compiler(lambda x: run_blocks(blocks, x, "none"))
        for a, b in zip(plain, of(run_them), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        weights = {parameter.data_ptr() for parameter in blocks.parameters()}
        sizes = {}

        def pack(tensor, sizes=sizes, weights=weights):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run_them(inputs)
        kept[budget] = sum(sizes.values())
        del result
    assert kept[0.0] <= 2 * inputs.nbytes < kept[1.0] / 4


@pytest.mark.parametrize("method", ["block", "every_k", "selective", "selective_matmul"])
def test_methods_inside_a_compiled_graph(compiler, method):
    blocks, inputs = make_blocks(num_layers=2), torch.randn(2, 16, 32)

    def of(run_them):
        blocks.zero_grad(set_to_none=True)
        run_them(inputs).square().mean().backward()
        return [parameter.grad for parameter in blocks.parameters()]

    plain = of(lambda x: run_blocks(blocks, x, "none"))
    for a, b in zip(plain, of(compiler(lambda x: run_blocks(blocks, x, method))), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_memory_budget_out_of_range(budget):
    with pytest.raises(SettingsError, match="--activation_memory_budget must be from 0 to 1"):
        set_activation_memory_budget(budget)


def test_memory_budget_needs_a_pytorch_that_has_it(monkeypatch):
    monkeypatch.setitem(torch._functorch.__dict__, "config", object())
    with pytest.raises(SettingsError, match="needs a PyTorch that has it"):
        set_activation_memory_budget(0.5)
    set_activation_memory_budget(None)


# -- the script --------------------------------------------------------------------------------------------------------


def test_main_measures_every_method(capsys, monkeypatch, tmp_path):
    flags = "--num_layers 2 --width 32 --batch_size 2 --context_length 32 --repeats 1 --use_compile false"
    monkeypatch.setattr("sys.argv", ["checkpointing.py", *flags.split(), "--output_folder", str(tmp_path)])
    assert checkpointing.main() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = json.loads((tmp_path / "techniques/checkpointing/run.json").read_text())["results"]
    assert last["rows"] == len(results["rows"]) == 7
    rows = {row["variant"]: row for row in results["rows"]}
    assert rows["block"]["saved_gib"] > 0 and rows["block"]["formula_saved_gib"] is not None
    if not torch.cuda.is_available():
        assert rows["offload"]["status"] == "unsupported" and "needs a GPU" in rows["offload"]["note"]
        assert {row["exactness"] for row in results["rows"]} == {None, "bitwise"}
    assert results["break_even"][0]["unit"] == "tokens"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_layers", "0"], "--num_layers must be at least 1"),
        (["--width", "100", "--num_heads", "3"], "not divisible by --num_heads"),
        (["--dropout", "1"], "--dropout"),
    ],
)
def test_wrong_settings_of_the_script(monkeypatch, tmp_path, flags, message):
    monkeypatch.setattr("sys.argv", ["checkpointing.py", *flags, "--output_folder", str(tmp_path)])
    with pytest.raises(SettingsError, match=message):
        checkpointing.main()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS[1:])
def test_gpu_gradients_are_bitwise_those_of_none(method, dropout):
    """bf16 autocast, flash-attn if it is installed; 128 tokens are one tile, so every sum has one order."""
    blocks = make_blocks(4, 256, 4, dropout, FLASH, "cuda")
    expected = gradients(blocks, "none", "bf16", batch=4, tokens=128)
    for _ in range(3):  # later steps reuse the memory and the pinned buffers of earlier ones
        assert all_equal(expected, gradients(blocks, method, "bf16", batch=4, tokens=128))


@pytest.mark.gpu
def test_gpu_attention_kernel_runs_once_with_selective():
    operator = {
        "flash_attn": "flash_attn._flash_attn_forward.default",
        "sdpa_flash": "aten._scaled_dot_product_flash_attention.default",
    }[FLASH]
    count = {}
    for method in ("none", "block", "selective", "selective_matmul"):
        blocks = make_blocks(4, 256, 4, 0.0, FLASH, "cuda")
        with Calls() as seen:
            gradients(blocks, method, "bf16", batch=2, tokens=128)
        count[method] = seen.count[operator]
    assert count == {"none": 4, "block": 8, "selective": 4, "selective_matmul": 4}


@pytest.mark.gpu
def test_gpu_peak_memory_follows_the_order():
    device = torch.device("cuda", torch.cuda.current_device())
    blocks = make_blocks(6, 512, 8, 0.0, FLASH, device)
    inputs = torch.randn(16, 256, 512, device=device)
    peaks = {}
    for method in ("none", "selective_matmul", "selective", "block", "offload"):
        for _ in range(2):  # the first makes the workspaces of the libraries
            blocks.zero_grad(set_to_none=False)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with autocast("bf16", device):
                hidden_states = run_blocks(blocks, inputs, method)
            hidden_states.square().mean().backward()
            del hidden_states
            torch.cuda.synchronize()
            peaks[method] = torch.cuda.max_memory_allocated()
    assert list(peaks) == sorted(peaks, key=peaks.get, reverse=True) and len(set(peaks.values())) == 5
    # `none` also keeps autocast's 16-bit copies of all weights, the others those of one block.
    copies = 2 * sum(p.numel() for block in blocks[1:] for p in block.parameters() if p.dim() == 2)
    for method in ("block", "selective", "selective_matmul"):
        shape = {"num_layers": 6, "width": 512, "num_heads": 8, "activation_bytes": 2}
        saved = saved_bytes_per_token("none", **shape) - saved_bytes_per_token(method, **shape)
        assert peaks["none"] - peaks[method] == pytest.approx(saved * 16 * 256 + copies, rel=0.1)


class Slow(nn.Module):
    """Much work between a large input and output, so that copies and their memory overlap with it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1024, 1024)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(self.linear(x))
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("breaks_off", [False, True])
def test_gpu_offload_copies_are_in_order(breaks_off):
    """Copies slower than the blocks, then faster; memory is reused at once, and a broken step leaves nothing wrong."""
    torch.manual_seed(0)
    for rows, module in ((32_768, lambda: nn.Sequential(nn.Linear(1024, 1024), nn.Tanh())), (8_192, Slow)):
        blocks = nn.ModuleList(module() for _ in range(8)).to("cuda")
        inputs = torch.randn(1, rows, 1024, device="cuda")

        def of(method, blocks=blocks, inputs=inputs):
            blocks.zero_grad(set_to_none=True)
            run_blocks(blocks, inputs * 1, method).square().mean().backward()
            return [parameter.grad.clone() for parameter in blocks.parameters()]

        expected = of("none")
        if breaks_off:
            for call in (1, 2):
                broken = nn.ModuleList([*blocks[:4], Fails(call), *blocks[4:]])
                with pytest.raises(torch.OutOfMemoryError):
                    run_blocks(broken, inputs * 1, "offload").square().mean().backward()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            assert all_equal(expected, of("offload"))
        assert torch.cuda.memory_allocated() <= before + GIB // 64


@pytest.mark.gpu
def test_gpu_offload_keeps_no_block_input_but_the_last_on_the_device():
    blocks = make_blocks(6, 512, 8, 0.0, FLASH, "cuda")
    inputs = torch.randn(16, 256, 512, device="cuda")
    kept = {}

    def requested() -> int:  # a block that the allocator had left from elsewhere can be up to 1 MiB larger than asked
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    for method in ("block", "block", "offload"):  # the first makes the workspaces of the libraries
        torch.cuda.synchronize()
        before = requested()
        with autocast("bf16", inputs.device):
            hidden_states = run_blocks(blocks, inputs, method)
        kept[method] = requested() - before
        del hidden_states
    # Inputs of blocks 1 to 4: block 0's is the caller's, block 5's stays.
    assert kept["block"] - kept["offload"] == pytest.approx(4 * inputs.nbytes, rel=0.02)
