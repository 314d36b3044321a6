"""Started by torchrun from the tests: calls llm_train.py once for each list of flags in a JSON file, one after another.

Importing PyTorch takes longer than training a tiny model, so many runs share their processes. What each of them
printed and its exit status are left in `<file>.<rank>`, with the collectives that training steps made.
"""

import contextlib
import io
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import llm_fit
import llm_train
import parallel
import processes
from utils import run_script


def overflow() -> int:
    """Gradients of which one number of rank 1 is infinite: both ranks print whether the scaler let the step happen."""
    with processes.process_group(cuda=False) as ranks:
        model = parallel.Stack(num_layers=2, width=32, vocab_size=64)
        model = parallel.place_model(model, replace(ranks, method="fsdp"), torch.device("cpu"), "fp32", "forward")
        optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
        scaler.scale(model(torch.arange(8)).square().mean()).backward()
        if ranks.rank == 1:
            model.head.weight.grad.to_local()[0, 0] = float("inf")
        before = model.embedding.weight.to_local().clone()
        scaler.step(optimizer)
        scaler.update()
        print(torch.equal(before, model.embedding.weight.to_local()), scaler.get_scale(), file=sys.stderr)
        return 0


SCRIPTS = {
    "llm_train": llm_train,
    "parallel": parallel,
    "overflow": SimpleNamespace(main=overflow, __name__="overflow"),
}


def call(argv: list[str], captured: bool, script: ModuleType = llm_train) -> dict:
    """One run in this process: status, standard output and error (where they do not go to torchrun's)."""
    out, err = (io.StringIO(), io.StringIO()) if captured else (sys.stdout, sys.stderr)
    status = 0
    with (
        patch.object(sys, "argv", [f"{script.__name__}.py", *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(os, "_exit", sys.exit if captured else os._exit),  # the next case is to run
    ):
        try:
            run_script(script.main)
        except SystemExit as end:
            status = end.code
        except Exception as error:
            import traceback

            traceback.print_exc(file=err)
            status = f"{type(error).__name__}: {error}"
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    texts = {"stdout": out.getvalue(), "stderr": err.getvalue()} if captured else {}
    return {"status": status, **texts}


def main() -> None:
    torch.set_num_threads(1)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    path = Path(sys.argv[1])
    results, count = [], Counter()
    real = llm_fit.training_step

    def signalled(*args: object, **kwargs: object) -> torch.Tensor:
        here = args[0].place[1] == case["step"]
        if here and os.environ["RANK"] == str(case.get("rank", 1)) and not restarted:
            os.kill(os.getpid(), signal.Signals[case["signal"]])
        return real(*args, **kwargs)

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss = real(*args, **kwargs)
        for event in profiler.key_averages():
            if event.key.startswith("gloo:"):
                count[event.key] += event.count
        return loss

    cases = json.loads(path.read_text())
    port = 20000 + os.getppid() % 9000
    for number, case in enumerate(cases):
        count.clear()
        if len(cases) > 1:  # the keys in torchrun's own store would be those of the run before
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port + number)}
        step = counted if case.get("count") else signalled if case.get("signal") else real
        with patch.object(llm_fit, "training_step", step):
            captured, script = case.get("signal") != "SIGKILL", SCRIPTS[case.get("script", "llm_train")]
            results.append(call(case["argv"], captured, script) | {"collectives": dict(count)})
        Path(f"{path}.{os.environ.get('RANK', '0')}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
