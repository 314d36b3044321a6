"""FP8: which layers are converted, emulated parity with bf16, MFU against both peaks, the benchmark's arithmetic."""

import csv
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fp8_benchmark
import fp8_results
import llm_fit
import llm_train
import precision
from checkpointing import MATMUL_OPERATORS
from precision import (
    FP8_RECIPES,
    autocast,
    convert_to_fp8,
    describe_fp8,
    fp8_skip_reason,
    fp8_unsupported_reason,
)
from run_folder import RunFolder
from transformer_based_llm import TransformerLM, model_config
from utils import SettingsError, model_flops_utilisation, peak_tflops, run_script

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = ["--num_layers=1", "--embedding_dim=32", "--num_heads=2", "--context_length=32", "--vocab_size=300"]
RUN = [*TINY, "--max_documents=20", "--batch_size=8", "--tracked_steps=1", "--measured_steps=2", "--figures=false"]


def small_model(size: str = "llama-tiny") -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(model_config(size, embedding_dim=64, num_heads=4, context_length=32, vocab_size=48))


def skip_head(name: str) -> str | None:
    return "the head stays" if name == "head" else None


# --- Which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["tiny", "llama-tiny"])
def test_converted_layers_keep_their_parameters(size):
    model = small_model(size)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    record = convert_to_fp8(model, emulated=True, skip=skip_head)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("head") == "Linear" and set(kinds.values()) == {"Float8Linear"}
    assert {row["name"] for row in record["converted"]} == {
        f"blocks.*.{name}" for name in ("attention.qkv", "attention.output", "mlp.expand", "mlp.contract")
    }
    assert all(row["count"] == 2 for row in record["converted"])
    assert record["kept"] == [{"name": "head", "inputs": 64, "outputs": 48, "why": "the head stays", "count": 1}]
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert record["converted_share"] == round(1 - 64 * 48 / linear, 4)
    assert json.loads(json.dumps(record)) == record
    words = describe_fp8(record)
    assert "2 x blocks.*.mlp.expand (64 to " in words and "head (64 to 48: the head stays)" in words
    assert "emulated" in words


@pytest.mark.parametrize(
    ("recipe", "inputs", "outputs", "converted"),
    [
        # At a width of 768 torchao's filter takes tensorwise's wide outputs only, and nothing of rowwise.
        ("tensorwise", 768, 2304, True),
        ("tensorwise", 768, 768, False),
        ("tensorwise", 3072, 768, False),
        ("tensorwise", 768, 32000, True),
        ("rowwise", 768, 2304, False),
        ("rowwise", 768, 32000, False),
        ("rowwise", 3072, 768, False),
        ("rowwise_with_gw_hp", 768, 3072, False),
        # At 4096 all but the keys and values of the course's model.
        ("tensorwise", 4096, 1024, False),
        ("tensorwise", 4096, 4096, True),
        ("rowwise", 4096, 14336, True),
        ("rowwise", 2048, 4096, False),
    ],
)
def test_layers_large_enough(recipe, inputs, outputs, converted):
    assert (fp8_skip_reason(recipe, inputs, outputs, "large") is None) == converted
    assert fp8_skip_reason(recipe, inputs, outputs, "all") is None


def test_our_filter_is_torchaos():
    own = precision.import_torchao("torchao.float8.float8_linear_utils")
    for recipe in ("tensorwise", "rowwise"):
        theirs = own._auto_filter_for_recipe(recipe, [])
        for inputs in (768, 1024, 2048, 4096, 8192, 1000):
            for outputs in (768, 1024, 2048, 4096, 8192, 1000):
                with torch.device("meta"):
                    layer = nn.Linear(inputs, outputs)
                assert theirs(layer, "x") == (fp8_skip_reason(recipe, inputs, outputs, "large") is None)


def test_sides_that_16_does_not_divide_stay():
    model = nn.Sequential(nn.Linear(32, 40), nn.Linear(32, 48))
    record = convert_to_fp8(model, emulated=True)
    assert [row["why"] for row in record["kept"]] == ["16 does not divide 32 and 40"]
    with pytest.raises(SettingsError, match="--precision fp8 has no layer to convert"):
        convert_to_fp8(nn.Sequential(nn.Linear(20, 20)), emulated=True)
    with pytest.raises(SettingsError, match="or --fp8_layers all"):
        convert_to_fp8(small_model(), "rowwise", layers="large", emulated=True)


# --- Where it runs ----------------------------------------------------------------------------------------------------


def test_where_it_can_run(monkeypatch):
    assert fp8_unsupported_reason(CPU, True, emulated=True) is None
    assert "need an NVIDIA GPU of compute capability 8.9" in fp8_unsupported_reason(CPU, True, False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda")
    assert "NVIDIA A100-SXM4-80GB has compute capability 8.0, and FP8 units need 8.9" in fp8_unsupported_reason(
        gpu, True, False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8_unsupported_reason(gpu, True, False) is None
    assert "add --use_compile true" in fp8_unsupported_reason(gpu, False, False)
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    assert "uv sync --extra torchao" in fp8_unsupported_reason(gpu, True, True)


# --- Parity, emulated -------------------------------------------------------------------------------------------------


def gradients(model: TransformerLM, kind: str) -> torch.Tensor:
    ids = torch.randint(48, (4, 33), generator=torch.Generator().manual_seed(2))
    with autocast(kind, CPU):
        logits = model(ids[:, :-1])
    F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_gradients_are_rounded_to_8_bits(recipe):
    exact, half = gradients(small_model(), "fp32"), gradients(small_model(), "bf16")
    model = small_model()
    convert_to_fp8(model, recipe, emulated=True, skip=skip_head)
    error = ((gradients(model, "fp8") - exact).norm() / exact.norm()).item()
    half_error = ((half - exact).norm() / exact.norm()).item()
    assert 2 * half_error < error < 0.1  # it does round, and by a few per cent only


@pytest.mark.parametrize("method", ["block", "every_k", "selective", "selective_matmul"])
def test_checkpointing_changes_nothing(method):
    found = []
    for chosen in ("none", method):
        torch.manual_seed(0)
        options = {"embedding_dim": 64, "num_heads": 4, "context_length": 32, "vocab_size": 48}
        model = TransformerLM(model_config("llama-tiny", gradient_checkpointing=chosen, **options))
        convert_to_fp8(model, "rowwise", emulated=True, skip=skip_head)
        found.append(gradients(model, "fp8"))
    assert torch.equal(*found)


def test_selective_matmul_keeps_fp8_products_too():
    """In compiled code they are this operator, which PyTorch must have under that name."""
    assert "aten._scaled_mm.default" in MATMUL_OPERATORS and str(torch.ops.aten._scaled_mm.default) in MATMUL_OPERATORS


def losses(recipe: str | None, seed: int, steps: int = 60) -> list[float]:
    """A small model on text in which the next token follows from the last two."""
    torch.manual_seed(seed)
    model = TransformerLM(
        model_config("llama-tiny", embedding_dim=64, num_heads=4, mlp_dim=128, context_length=32, vocab_size=48)
    )
    if recipe is not None:
        convert_to_fp8(model, recipe, emulated=True, skip=skip_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        rows = [torch.randint(48, (8,), generator=generator), torch.randint(48, (8,), generator=generator)]
        for _ in range(31):
            rows.append((rows[-1] + 2 * rows[-2] + 1) % 48)
        ids = torch.stack(rows, dim=1)
        with autocast("bf16" if recipe is None else "fp8", CPU):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def test_the_loss_curve_is_that_of_bf16():
    plain, other_seed = losses(None, seed=0), losses(None, seed=1)
    spread = max(abs(one - other) for one, other in zip(plain, other_seed, strict=True))
    assert plain[-1] < plain[0] - 0.3  # it learns
    for recipe in FP8_RECIPES:
        emulated = losses(recipe, seed=0)
        assert emulated != plain
        assert max(abs(one - other) for one, other in zip(plain, emulated, strict=True)) < 0.03 < spread / 3


# --- In the trainer ---------------------------------------------------------------------------------------------------


def call(monkeypatch, script, words: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *words])
    with pytest.raises(SystemExit) as caught:
        run_script(script.main)
    return caught.value.code


def test_an_emulated_run_says_what_it_is(monkeypatch, tmp_path, capsys):
    words = [*RUN, "--precision=fp8", "--fp8_emulation=true", "--fp8_recipe=rowwise", "--max_steps=5"]
    words += [f"--cache_folder={tmp_path / 'cache'}"]
    assert call(monkeypatch, llm_train, [*words, f"--output_folder={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert (
        "fp8 rowwise (emulated: its time and memory say nothing about FP8)" in said
        and "MFU" not in said.split("step ")[-1]
    )
    (folder,) = (path.parent for path in tmp_path.glob("out/llm/*/run.json"))
    assert folder.name == "tiny-fp8-rowwise-emulated-sdpa-batch-8"
    info = json.loads((folder / "run.json").read_text())
    assert info["precision"] == "fp8" and info["fp8"]["emulated"] and info["fp8"]["recipe"] == "rowwise"
    assert [row["name"] for row in info["fp8"]["kept"]] == ["head"]
    assert info["results"]["mfu"] is None and info["results"]["mfu_denominator_tflops"] is None
    assert "mfu_fp8_peak" not in info["results"]
    # The head is converted too where it is asked for; the run then is another one.
    words += ["--fp8_head=true", "--vocab_size=304", f"--output_folder={tmp_path / 'head'}"]
    assert call(monkeypatch, llm_train, words) == 0
    (folder,) = (path.parent for path in tmp_path.glob("head/llm/*/run.json"))
    assert json.loads((folder / "run.json").read_text())["fp8"]["kept"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision=fp8"], "--precision fp8 cannot run here: FP8 products need an NVIDIA GPU"),
        (["--fp8_recipe=rowwise"], "--fp8_recipe has no effect without --precision fp8"),
        (["--fp8_head=true", "--precision=bf16"], "--fp8_head has no effect without --precision fp8"),
        (["--fp8_emulation=true"], "--fp8_emulation has no effect without --precision fp8"),
        (["--fp8_layers=large"], "--fp8_layers has no effect without --precision fp8"),
        (
            ["--precision=fp8", "--fp8_emulation=true", "--fp8_head=true", "--loss=chunked"],
            "--fp8_head true has no effect with --loss chunked",
        ),
        (["--precision=fp8", "--fp8_emulation=true", "--gelu=fused"], "--gelu fused"),
        (["--precision=fp8", "--fp8_emulation=true", "--fp8_layers=large"], "has no layer to convert"),
        (["--model_size=llama-1b"], "--model_size llama-1b is a llama, and --model_type is transformer"),
        (["--model_size=gpt2", "--model_type=llama"], "add --model_type transformer"),
    ],
)
def test_wrong_settings_are_a_sentence(monkeypatch, tmp_path, capsys, words, said):
    places = [f"--output_folder={tmp_path}", f"--cache_folder={tmp_path / 'cache'}"]
    assert call(monkeypatch, llm_train, [*RUN, *words, *places]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1
    assert not list(tmp_path.glob("llm/*"))


def test_mfu_is_given_against_both_peaks():
    name = "NVIDIA H100 80GB HBM3"
    peaks = {kind: peak_tflops(name, kind) for kind in ("bf16", "fp8")}
    assert peaks == {"bf16": 989.4, "fp8": 1978.8}
    headline = {"step_ms_median": 366.943, "tokens_per_s": 89_300.0, "timed_steps": 280}
    training = SimpleNamespace(
        peaks=peaks,
        flops_per_token=7_842_299_904,
        steps_per_epoch=318,
        compile_s=1.0,
        measured_before={},
        machine="1 x card",
        memory_headline=dict,
    )
    results = llm_fit.Training.measured(training, SimpleNamespace(headline=lambda: dict(headline)))
    # 89,300 x 7,842,299,904 = 700.3174 TFLOP/s: 0.70782 of 989.4, 0.35391 of 1978.8.
    assert (results["mfu_bf16_peak"], results["mfu_fp8_peak"]) == (0.7078, 0.3539)
    assert model_flops_utilisation(89_300, 7_842_299_904, 1978.8) == pytest.approx(0.35391, rel=1e-4)
    training.peaks = {"bf16": None, "fp8": None}  # a GPU that is not in the table
    results = llm_fit.Training.measured(training, SimpleNamespace(headline=lambda: dict(headline)))
    assert (results["mfu_bf16_peak"], results["mfu_fp8_peak"]) == (None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_a_compiled_run_on_fp8_units(monkeypatch, tmp_path, capsys, recipe):
    if (reason := fp8_unsupported_reason(torch.device("cuda"), True, False)) is not None:
        pytest.skip(reason)
    words = [*RUN, "--model_type=llama", "--precision=fp8", f"--fp8_recipe={recipe}", "--use_compile=true"]
    words += ["--embedding_dim=256", "--mlp_dim=512", "--num_heads=4", "--num_kv_heads=2", "--max_steps=8"]
    words += ["--model_size=llama-tiny", f"--output_folder={tmp_path}", f"--cache_folder={tmp_path / 'cache'}"]
    assert call(monkeypatch, llm_train, words) == 0
    (path,) = tmp_path.glob("llm/*/run.json")
    info = json.loads(path.read_text())
    assert not info["fp8"]["emulated"] and info["results"]["test_loss"] > 0
    assert call(monkeypatch, llm_train, [word for word in words if "compile" not in word]) == 2
    assert "add --use_compile true" in capsys.readouterr().err


# --- The benchmark ----------------------------------------------------------------------------------------------------


def row(
    width: int, speedup: float, variant: str = "tensorwise", name: str = "square", question: str = "layers"
) -> dict:
    facts = {"question": question, "name": name, "tokens": 64, "width": width, "variant": variant}
    return facts | {"speedup": speedup, "clear": "yes" if speedup > 1 else "no"}


@pytest.mark.parametrize(
    ("points", "slower_at", "faster_from"),
    [
        ([(512, 0.6), (1024, 0.9), (2048, 1.2), (4096, 1.4)], 1024, 2048),
        ([(512, 1.1), (1024, 0.9), (2048, 1.2)], 1024, 2048),  # a lucky point below does not count
        ([(512, 1.1), (1024, 1.3)], None, 512),
        ([(512, 0.5), (1024, 1.0)], 1024, None),
    ],
)
def test_break_even_width(points, slower_at, faster_from):
    rows = [row(width, speedup) for width, speedup in reversed(points)] + [row(64, 1.0, variant="bf16")]
    (answer,) = fp8_results.break_even(rows, "layers")
    assert (answer["slower_at"], answer["faster_from"]) == (slower_at, faster_from)


def test_blocks_of_a_family_make_one_answer():
    names = ((768, 0.8, "gpt2"), (1600, 0.9, "gpt2-xl"), (2048, 0.9, "llama-1b"), (4096, 1.4, "llama-8b"))
    rows = [row(width, speedup, name=name, question="blocks") for width, speedup, name in names]
    answers = fp8_results.break_even(rows, "blocks")
    found = [(answer["name"], answer["slower_at"], answer["faster_from"]) for answer in answers]
    assert found == [("gpt2", 1600, None), ("llama", 2048, 4096)]


@pytest.mark.parametrize("missing", [None, ""])
def test_a_width_that_failed_is_neither_faster_nor_slower(missing):
    rows = [row(512, 0.9), row(1024, 1.3), row(2048, 1.4) | {"speedup": missing, "clear": missing}]
    (answer,) = fp8_results.break_even(rows, "layers")
    assert (answer["slower_at"], answer["faster_from"], answer["not_measured"]) == (512, 1024, [2048])
    assert fp8_results.in_words(answer) == "1,024 (not yet at 512); not measured: 2,048"
    (answer,) = fp8_results.break_even(rows[2:], "layers")
    assert fp8_results.in_words(answer) == "-; not measured: 2,048"
    (answer,) = fp8_results.break_even(rows[:1], "layers")
    assert fp8_results.in_words(answer) == "not up to 512"


def test_a_width_within_the_noise_is_not_faster():
    (answer,) = fp8_results.break_even([row(512, 1.02) | {"clear": "no"}, row(1024, 1.3)], "layers")
    assert (answer["slower_at"], answer["faster_from"]) == (512, 1024)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A benchmark on a CPU: a recorded step is the step, and the clock is what `clocks` says, the last one for ever."""
    settings = fp8_benchmark.Settings(output_folder=str(tmp_path), repeats=2)
    run = RunFolder.create(settings.output_folder, "fp8", "x", unique=True)
    clocks = [2000.0]
    monkeypatch.setattr(fp8_benchmark, "RecordedStep", lambda step: step)
    monkeypatch.setattr(fp8_benchmark, "LOAD_SECONDS", 0.01)
    monkeypatch.setattr(fp8_benchmark, "gpu_clock_mhz", lambda _: clocks.pop(0) if len(clocks) > 1 else clocks[0])
    monkeypatch.setattr(fp8_benchmark, "three_products", lambda tokens, *_: lambda: time.sleep(tokens / 1e6))
    return fp8_benchmark.Benchmark(settings, run, CPU), clocks


def products(bench, *rows: tuple[str, int]) -> list[dict]:
    for variant, microseconds in rows:
        bench.products("square", 512, microseconds, 512, 512, variant)
    with (bench.run.path / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_row_is_timed_in_turn_with_bf16(bench):
    bench, _ = bench
    rows = products(bench, ("bf16", 20_000), ("tensorwise", 10_000), ("rowwise", 40_000), ("bf16", 5_000))
    assert [row["status"] for row in rows] == ["ok"] * 4 and {row["n"] for row in rows} == {"6"}
    assert [row["clear"] for row in rows] == ["", "yes", "no", ""] and rows[0]["bf16_ms"] == rows[3]["bf16_ms"] == ""
    for line, expected in zip(rows[1:3], (2.0, 0.5), strict=True):
        assert 20 <= float(line["bf16_ms"]) < 30 and float(line["bf16_ms"]) != float(rows[0]["ms"])
        assert float(line["speedup"]) == pytest.approx(float(line["bf16_ms"]) / float(line["ms"]), abs=1e-4)
        assert float(line["speedup"]) == pytest.approx(expected, rel=0.25)
    (last,) = products(bench, ("tensorwise", 10_000))[4:]
    assert float(last["speedup"]) == pytest.approx(0.5, rel=0.25)  # the bf16 before it is another group's


def test_a_card_that_is_held_back_has_no_speedup(bench):
    bench, clocks = bench
    clocks[:] = [1980, 1400, 1980, 980, 1000, 1000, 985, 985, 1200, 1970]  # three a row: their median counts
    rows = products(bench, ("bf16", 2_000), ("tensorwise", 1_000), ("rowwise", 1_000), ("rowwise_with_gw_hp", 1_000))
    assert [row["status"] for row in rows] == ["ok", "ok", "throttled", "ok"]
    assert [row["clock_mhz"] for row in rows] == ["1980", "1000", "985", "1970"]
    assert (rows[2]["speedup"], rows[2]["clear"], rows[2]["tflops"]) == ("", "", "") and float(rows[2]["ms"]) >= 1
    assert rows[3]["speedup"] != "" and bench.highest_mhz == 1980.0
    assert fp8_results.break_even(bench.rows, "products")[1]["not_measured"] == [512]


def test_without_a_time_of_bf16_there_is_no_speedup(bench, monkeypatch):
    bench, _ = bench
    sound = fp8_benchmark.three_products

    def full(tokens: int, *rest):
        def step():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return step if rest[-1] == "bf16" else sound(tokens, *rest)

    monkeypatch.setattr(fp8_benchmark, "three_products", full)
    rows = products(bench, ("bf16", 1_000), ("tensorwise", 1_000))
    assert [(row["status"], row["speedup"], row["clear"]) for row in rows] == [("oom", "", ""), ("ok", "", "")]


def test_a_step_that_cannot_be_recorded_is_out_of_memory(bench, monkeypatch):
    bench, _ = bench

    def recorded(step):
        def full():
            raise torch.OutOfMemoryError("CUDA out of memory")

        return full

    monkeypatch.setattr(fp8_benchmark, "RecordedStep", recorded)
    products(bench, ("bf16", 1_000))
    monkeypatch.setattr(fp8_benchmark, "RecordedStep", lambda step: step)
    rows = products(bench, ("tensorwise", 1_000))
    assert (rows[0]["status"], rows[0]["ms"]) == ("oom", "")
    assert rows[1]["status"] == "ok" and rows[1]["speedup"] == ""


def test_operands_that_do_not_fit_are_a_row(bench, monkeypatch):
    bench, _ = bench
    products(bench, ("bf16", 1_000))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fp8_benchmark, "three_products", full)
    rows = products(bench, ("bf16", 1_000), ("rowwise", 1_000))
    assert [row["status"] for row in rows] == ["ok", "oom", "oom"] and bench.base is None


def test_work_comes_before_the_rounds(bench, monkeypatch):
    bench, _ = bench
    calls = []
    monkeypatch.setattr(fp8_benchmark, "LOAD_SECONDS", 0.05)
    assert bench.load([lambda: calls.append("a") or time.sleep(0.01), lambda: calls.append("b")]) >= 2
    assert calls[:4] == ["a", "b", "a", "b"] and 4 <= len(calls) <= 12
    monkeypatch.setattr(fp8_benchmark, "LOAD_SECONDS", 0.0)
    assert bench.load([lambda: calls.append("c")]) == 1 and calls[-1] == "c"  # once at least: the first call records


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_numbers_come_back(rowwise, dtype):
    values = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 32)[:, None]
    codes, scale = fp8_benchmark.scaled(values, dtype, rowwise)
    assert codes.dtype == dtype and codes.float().abs().max() == torch.finfo(dtype).max
    assert scale.shape == ((32, 1) if rowwise else ())
    back = codes.float() * scale
    step = 2 ** -(3 if dtype == torch.float8_e4m3fn else 2)  # distance of two numbers next to 1
    row_error = (back - values).norm(dim=1) / values.norm(dim=1)
    assert row_error.max() < step if rowwise else row_error[-1] < step
    assert rowwise or row_error[0] > row_error[-1]  # one scale for all rounds small rows away


@pytest.mark.parametrize("size", ["gpt2", "llama-1b"])
def test_flops_of_a_block(size, monkeypatch):
    build, width, context, flop_per_token = fp8_benchmark.block_of(size, "eager")
    real = torch.device
    monkeypatch.setattr(fp8_benchmark.torch, "device", lambda kind, *rest: real("meta" if kind == "cuda" else kind))
    monkeypatch.setattr(fp8_benchmark, "model_config", lambda name, **options: model_config(name, **options))
    block = build("bf16")
    assert block.attention.output.in_features == width
    inputs = torch.zeros(1, context, width, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        block(inputs).sum().backward()
    assert counter.get_total_flops() == flop_per_token * context


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths=100"], "--widths 100 must be rising numbers, multiples of 16"),
        (["--tokens=a"], "--tokens a must be rising numbers, multiples of 16"),
        (["--questions=speed"], "--questions speed must be different ones of products, layers, blocks"),
        (["--recipes="], "--recipes  must be different ones of"),
        (["--repeats=0"], "--repeats must be at least 1, not 0"),
        (["--block_tokens=1000"], "--block_tokens 1000 must be a multiple of 4096"),
    ],
)
def test_wrong_benchmark_settings(monkeypatch, capsys, words, said):
    assert call(monkeypatch, fp8_benchmark, words) == 2
    assert said in capsys.readouterr().err


def test_spaces_between_names_leave_nothing_out(monkeypatch):
    monkeypatch.setattr(fp8_benchmark, "fp8_unsupported_reason", lambda *_, **__: None)
    settings = fp8_benchmark.Settings(
        questions="products, layers", recipes=" rowwise , tensorwise", models="gpt2, gpt2-xl"
    )
    fp8_benchmark.check(settings, CPU)
    assert (settings.questions, settings.recipes, settings.models) == (
        "products,layers", "rowwise,tensorwise", "gpt2,gpt2-xl",
    )  # fmt: skip


def test_the_benchmark_needs_fp8_units(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(monkeypatch, fp8_benchmark, [f"--output_folder={tmp_path}"]) == 2
    assert "nothing to measure: FP8 products need an NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_the_benchmark_measures(monkeypatch, tmp_path):
    if (reason := fp8_unsupported_reason(torch.device("cuda"), True, False)) is not None:
        pytest.skip(reason)
    words = ["--widths=256", "--tokens=4096", "--models=gpt2", "--repeats=2", f"--output_folder={tmp_path}"]
    assert call(monkeypatch, fp8_benchmark, words) == 0
    lines = (tmp_path / "fp8" / "benchmark" / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * (3 + 3 + 1) and all(",ok," in line for line in lines[1:])
