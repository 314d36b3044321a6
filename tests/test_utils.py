"""utils.py: flags, YAML and saved values give settings; FLOPs, peaks, MFU and percentiles are those done by hand."""

import sys
from dataclasses import asdict, dataclass

import pytest
import torch

import utils
from utils import (
    SettingsError,
    model_flops_utilisation,
    parse_settings,
    peak_tflops,
    percentile,
    run_script,
    setting,
    training_flops_per_token,
)


@dataclass
class Settings:
    """One setting of each kind that the scripts use."""

    steps: int = setting(10, "how many steps, 100 % of them")
    learning_rate: float = setting(0.5, "learning rate")
    fast: bool = setting(False, "off by default")
    careful: bool = setting(True, "on by default")
    kernel: str | None = setting(None, "one of a few", ["flash", "math"])
    name: str | None = setting(None, "any text")
    config: str | None = setting(None, "YAML file")


@pytest.fixture
def parse(tmp_path):
    """Parse flags, with `yaml` as the content of the --config file if given; returns what differs from the defaults."""

    def parse_words(*words: str, yaml: str | bytes | None = None, saved: dict | None = None) -> dict:
        if yaml is not None:
            path = tmp_path / "settings.yaml"
            path.write_bytes(yaml.encode() if isinstance(yaml, str) else yaml)
            words = ("--config", str(path), *words)
        values = asdict(parse_settings(Settings, list(words), saved=saved))
        values.pop("config")
        return {name: value for name, value in values.items() if value != getattr(Settings(), name)}

    return parse_words


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--steps 3 --learning_rate 1e-3", {"steps": 3, "learning_rate": 0.001}),
        ("--steps=3 --steps=4", {"steps": 4}),
        ("--learning_rate -2", {"learning_rate": -2.0}),
        ("--fast", {"fast": True}),
        ("--fast true", {"fast": True}),
        ("--fast false", {}),
        ("--fast --steps 3", {"fast": True, "steps": 3}),
        ("--careful", {}),
        ("--careful false", {"careful": False}),
        ("--kernel math --name żółw", {"kernel": "math", "name": "żółw"}),
    ],
)
def test_flags(parse, words, changed):
    assert parse(*words.split()) == changed


@pytest.mark.parametrize(
    ("yaml", "words", "changed"),
    [
        ("steps: 3\nfast: true\ncareful: no\nname: ż\n", "", {"steps": 3, "fast": True, "careful": False, "name": "ż"}),
        ("steps: 3\nlearning_rate: 1e-3\n", "--steps 4", {"steps": 4, "learning_rate": 0.001}),
        ("fast: true\n", "--fast false", {}),
        ("steps: 3\n", "--steps 10", {}),  # a flag wins even with the default's value
        ("name: -a=b %d\n", "", {"name": "-a=b %d"}),
        ("kernel: null\nsteps: '3'\n", "", {"steps": 3}),
        ("", "--steps 4", {"steps": 4}),
        ("# nothing\n", "", {}),
    ],
)
def test_yaml_under_flags(parse, yaml, words, changed):
    assert parse(*words.split(), yaml=yaml) == changed


def test_saved_values_are_below_yaml_and_flags(parse):
    saved = {"steps": 1, "learning_rate": 0.1, "name": "saved", "fast": True}
    assert parse(saved=saved) == saved
    changed = parse("--steps", "3", "--fast", "false", yaml="steps: 2\nlearning_rate: 0.2\n", saved=saved)
    assert changed == {"steps": 3, "learning_rate": 0.2, "name": "saved"}
    assert parse(yaml="name: null\n", saved=saved) == {k: v for k, v in saved.items() if k != "name"}


@pytest.mark.parametrize(
    ("words", "yaml"),
    [
        ("--unknown 3", None),
        ("--step 3", None),  # no abbreviations
        ("--steps 1.5", None),
        ("--steps", None),
        ("--learning_rate fast", None),
        ("--fast maybe", None),
        ("--kernel slow", None),
        ("left_over", None),
        ("", "steps: 1.5"),
        ("", "steps: true"),
        ("", "steps: [1, 2]"),
        ("", "learning_rate: {a: 1}"),
        ("", "fast: maybe"),
        ("", "kernel: slow"),
    ],
)
def test_wrong_flag_or_type_is_status_2(parse, capsys, words, yaml):
    with pytest.raises(SystemExit) as stopped:
        parse(*words.split(), yaml=yaml)
    assert stopped.value.code == 2
    named = (yaml or words).split()[0].strip(":").lstrip("-")
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("yaml", "reason"),
    [
        ("stepz: 3\nsteps: 2\nrate: 1\n", "unknown settings: rate, stepz"),
        ("1: 3\nrate: 1\n", "unknown settings: 1, rate"),
        ("- steps\n", "not a mapping"),
        ("steps\n", "not a mapping"),
        ("steps: [1\n", "cannot be read as YAML"),
        ("steps: 1\n  rate: 2\n", "cannot be read as YAML"),
        (b"name: \xff\xfe\n", "cannot be read as YAML"),
        ("name: !!python/object/apply:os.system [exit]\n", "cannot be read as YAML"),
    ],
)
def test_wrong_yaml_is_one_sentence(parse, yaml, reason):
    with pytest.raises(SettingsError, match=reason) as caught:
        parse(yaml=yaml)
    assert str(caught.value).startswith("--config ") and "\n" not in str(caught.value)


def test_missing_yaml_is_one_sentence(tmp_path):
    with pytest.raises(SettingsError, match=r"--config .*none.yaml cannot be read: No such file"):
        parse_settings(Settings, ["--config", str(tmp_path / "none.yaml")])


def test_yaml_goes_unread_where_the_class_has_no_config():
    @dataclass
    class Plain:
        steps: int = setting(1, "steps")

    assert parse_settings(Plain, ["--steps", "2"]) == Plain(2)
    with pytest.raises(SystemExit, match="2"):
        parse_settings(Plain, ["--config", "a.yaml"])


def test_help_shows_percent_signs(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings(Settings, ["--help"])
    assert stopped.value.code == 0
    assert "100 % of them" in " ".join(capsys.readouterr().out.split())


def test_run_script_prints_one_sentence_and_exits_with_2(monkeypatch, capsys):
    def main() -> int:
        raise SettingsError("--steps must be at least 1")

    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    assert capsys.readouterr().err == "train.py: error: --steps must be at least 1\n"
    with pytest.raises(SystemExit, match="7"):
        run_script(lambda: 7)


def test_run_script_says_that_memory_ran_out_and_hides_no_other_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fused_gelu.py"])
    with pytest.raises(SystemExit, match="1"):
        run_script(lambda: torch.empty(2**60))
    said = capsys.readouterr().err
    assert said.startswith("fused_gelu.py: error: these sizes do not fit into memory (") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="must match the size"):
        run_script(lambda: torch.ones(2) + torch.ones(3))


# --- FLOPs, peak rates, MFU -------------------------------------------------------------------------------------------


def test_flops_of_the_134_million_decoder():
    # A block: qkv 768 x 2304 = 1,769,472; output 768 x 768 = 589,824; two MLP matrices 768 x 3072 = 2,359,296 each.
    # 1,769,472 + 589,824 + 2 x 2,359,296 = 7,077,888; 12 blocks 84,934,656; head 768 x 32,000 = 24,576,000.
    matmul_parameters = 84_934_656 + 24_576_000
    assert matmul_parameters == 109_510_656
    # 6 x 109,510,656 = 657,063,936; attention 12 x 12 layers x 768 x 256 = 28,311,552.
    assert training_flops_per_token(matmul_parameters, 12, 768, 256) == 657_063_936 + 28_311_552 == 685_375_488
    # Causal: half of the attention term, 14,155,776. Context 1024: four times the term, 113,246,208.
    assert training_flops_per_token(matmul_parameters, 12, 768, 256, 0.5) == 657_063_936 + 14_155_776
    assert training_flops_per_token(matmul_parameters, 12, 768, 1024) == 657_063_936 + 113_246_208


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H200", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 756.0, 378.0, None),
        ("NVIDIA A100-SXM4-80GB", 312.0, 312.0, 156.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 312.0, 156.0, 19.5),
        ("A100-SXM4-40GB", 312.0, 312.0, 156.0, 19.5),
        ("NVIDIA A40", 149.7, 149.7, 74.8, 37.4),
        ("NVIDIA L4", 121.0, 121.0, 60.5, None),
        ("NVIDIA L40S", 362.0, 362.0, 181.0, None),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6, None),
        ("Tesla V100-SXM2-16GB", None, 125.0, None, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112.0, None, None),
        ("Tesla T4", None, 65.0, None, 8.1),
    ],
)
def test_peak_of_known_gpus(name, bf16, fp16, tf32, fp32):
    peaks = [peak_tflops(name, precision) for precision in ("bf16", "fp16", "tf32", "fp32")]
    assert peaks == [bf16, fp16, tf32, fp32]


@pytest.mark.parametrize(("pattern", "rates"), utils.PEAK_TFLOPS)
def test_fp8_units_have_twice_the_rate_of_bf16(pattern, rates):
    """Hopper, Ada and Blackwell have them; no older GPU."""
    has_units = any(sign in pattern for sign in ("H100", "B200", "L4", "RTX 4090", "RTX 5090"))
    assert rates.get("fp8") == (pytest.approx(2 * rates["bf16"]) if has_units else None)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "AMD EPYC 7763 64-Core Processor (4 threads)",
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (2 threads)",
        "arm (8 threads)",
        "",
    ],
)
def test_peak_of_everything_else_is_unknown(name):
    assert [peak_tflops(name, precision) for precision in ("bf16", "fp16", "tf32", "fp32", "fp8")] == [None] * 5


def test_this_machine_without_a_gpu_has_no_peak():
    name = utils.device_name(torch.device("cpu"))
    assert name.endswith(f"({torch.get_num_threads()} threads)") and len(name) > len("(1 threads)")
    assert peak_tflops(name, "fp32") is None


def test_mfu():
    # 100,000 tokens/s x 685,375,488 FLOP = 68.5375488 TFLOP/s; of 312 TFLOP/s that is 0.21967.
    assert model_flops_utilisation(100_000, 685_375_488, 312.0) == pytest.approx(0.2196716, rel=1e-6)
    assert model_flops_utilisation(100_000, 685_375_488, None) is None


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([7.0], 20, 7.0), ([4, 1, 3, 2], 50, 2.5), ([1, 2, 3, 4, 5, 6], 20, 2.0), ([0, 10], 80, 8.0)],
)
def test_percentile(values, percent, expected):
    assert percentile(values, percent) == (None if expected is None else pytest.approx(expected))


def test_lists_of_names_and_of_rising_numbers():
    assert utils.read_names("kinds", "b, a", ("a", "b")) == ["b", "a"]
    for text in ("", "c", "a,a", ","):
        with pytest.raises(utils.SettingsError, match=f"--kinds {text} must be different ones of a, b"):
            utils.read_names("kinds", text, ("a", "b"))
    assert utils.read_rising("sizes", "16,48", multiple=16, most=48) == [16, 48]
    for text in ("", "x", "8,8", "16,8", "0,8", "-8", "8,24", "12"):
        with pytest.raises(
            utils.SettingsError, match=f"--sizes {text} must be rising numbers up to 16, multiples of 8"
        ):
            utils.read_rising("sizes", text, most=16, multiple=8)
