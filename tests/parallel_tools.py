"""What the tests of parallel runs share: tiny settings, and torchrun on two processes of this machine's CPU."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import parallel_driver
import torch

DRIVER = Path(__file__).with_name("parallel_driver.py")
SCRIPT = Path(__file__).parent.parent / "llm_train.py"
BASE = {
    "num_layers": 2, "embedding_dim": 32, "num_heads": 2, "context_length": 32, "vocab_size": 300,
    "max_documents": 20, "batch_size": 8, "max_steps": 12, "tracked_steps": 2, "measured_steps": 3, "device": "cpu",
    "figures": False,
}  # fmt: skip


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def torchrun(script: Path, *argv: str, options: tuple[str, ...] = (), seconds: float = 200) -> tuple[int, str, str]:
    """Two processes; exit status, standard output and error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        [*command, str(script), *argv], env=environment, capture_output=True, text=True, timeout=seconds
    )
    return done.returncode, done.stdout, done.stderr


@dataclass
class Run:
    """A run of the driver: what each rank said, and the folder."""

    ranks: list[dict]  # status, stdout, stderr, collectives
    path: Path

    @property
    def info(self) -> dict:
        return json.loads((self.path / "run.json").read_text())

    @property
    def steps(self) -> list[dict]:
        return [json.loads(line) for line in (self.path / "steps.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]


def drive(folder: Path, cases: dict[str, dict], processes: int = 2) -> dict[str, Run]:
    """Run llm_train.py for each case, all in the same processes: {name: {flag: value, ..., "_count": ...}}.

    Keys that begin with _ are the driver's. A case goes into folder/llm/<its name>, or the folder it resumes.
    """
    listed, paths = [], []
    for name, case in cases.items():
        own = {key: value for key, value in case.items() if not key.startswith("_")}
        defaults = {"run_name": name, "output_folder": folder, "cache_folder": folder / "cache"}
        settings = own if "resume" in own or "_script" in case else BASE | defaults | own
        paths.append(Path(own["resume"]) if "resume" in own else folder / "llm" / settings.get("run_name", name))
        listed.append({"argv": flags(settings)} | {key[1:]: v for key, v in case.items() if key.startswith("_")})
    file = folder / f"cases-{next(iter(cases))}-{processes}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(listed))
    if processes == 2:
        status, out, err = torchrun(DRIVER, str(file))
        assert status == 0, out + err
        results = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(processes)]
    else:  # here: PyTorch is loaded already
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(1)
        results = [[parallel_driver.call(case["argv"], captured=True) for case in listed]]
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    return {
        name: Run([result[place] for result in results], path)
        for place, (name, path) in enumerate(zip(cases, paths, strict=True))
    }


def difference(values: list[float], reference: list[float]) -> float:
    """The largest relative difference of two loss curves of one length."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, reference, strict=True))
