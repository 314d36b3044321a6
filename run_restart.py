"""How a run that broke off is found again and gone on with, and what one says whose other process is gone.

    torchrun --max_restarts=3 --nproc_per_node=2 llm_train.py --parallel ddp --checkpoint_every_minutes 10
    llm_train.py --run_name A --auto_resume true            begins A, or goes on with it: for a job that is requeued

When a process dies, those that are left notice it in the next step: one of them writes it into run.json and prints how
to go on, and torchrun ends the others. With --max_restarts torchrun starts all processes again; they find the newest
run of the same command and launcher that is not finished and go on from its last checkpoint, or from step 0.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from processes import Ranks
from run_folder import RunFolder, command_line
from sharded_checkpoint import newest
from utils import SettingsError


def is_restart() -> bool:
    """Whether torchrun has started this process again after a failure; of several nodes, one may count none."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launcher() -> str | None:
    """Which torchrun started this process: its --rdzv_id, and without one its process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if name == "none" else name


def earlier_run(settings: Any, restarted: bool) -> Path | None:
    """The folder, with its run.json, that this call goes on with without --resume; None to begin a new one.

    Args:
        restarted: whether torchrun has started any rank again.

    Raises:
        SettingsError: --auto_resume without --run_name, or beside --resume.
    """
    if settings.auto_resume and settings.run_name is None:
        raise SettingsError("--auto_resume true goes on with the run of a name; give --run_name")
    folder = Path(settings.output_folder) / settings.experiment
    if settings.run_name is not None:
        path = folder / settings.run_name
        return path if (settings.auto_resume or restarted) and (path / "run.json").is_file() else None
    if not restarted:
        return None
    found = []
    for path in folder.glob("*/run.json"):
        with suppress(OSError, ValueError):
            info = json.loads(path.read_text(encoding="utf-8"))
            if info.get("argv") == command_line() and info.get("launcher") == launcher():
                found.append((info.get("started_at", ""), path.stat().st_mtime, path.parent))
    return max(found)[2] if found else None


def how_to_go_on(path: Path, ranks: Ranks) -> str:
    """The command that goes on from the last checkpoint, or that there is none."""
    script = Path(sys.argv[0]).name
    checkpoint = newest(path / "checkpoint")
    if checkpoint is None:
        return "no checkpoint had been saved (--checkpoint_every_minutes saves them)"
    start = f"torchrun --nproc_per_node={ranks.world_size}" if ranks.method is not None else "python"
    return f"go on with: {start} {script} --resume {path}"


def note_failure(run: RunFolder, ranks: Ranks, status: str, reason: str) -> None:
    """Write how the run ended, unless that is known already: the first reason is the true one.

    In a parallel run whoever fails writes it, whichever rank: the first one may be gone.
    """
    if ranks.world_size > 1:
        with suppress(OSError, ValueError):
            run.info = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
        run.writes = True
        reason = f"rank {ranks.rank}: {reason}"
    if not run.info:
        return  # nothing has begun
    if run.info.get("status") == "running":  # a resumed run keeps its status if it fails before it goes on
        with suppress(SettingsError):  # where the disk is full, the first error is the one to report
            run.update(status=status, error=reason)


def end_lost(run: RunFolder, ranks: Ranks, error: BaseException) -> int:
    """Say that another process of the run is gone; returns the exit status.

    The ranks that are left look one after another, so that one of them says it. A process that ended with an error of
    its own has written that into run.json before it went.
    """
    time.sleep(0.5 * ranks.rank)
    info: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        info = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    if info.get("status") in ("lost", "ok"):
        return 1
    if info.get("status") == "running":
        reason = "a process of the run died or was lost"
        note_failure(run, ranks, "lost", f"{reason} ({' '.join(str(error).split())[:200]})")
    else:
        reason = f"a process of the run ended: {info.get('error', info.get('status'))}"
    words = f"{run.path}: {reason}; {how_to_go_on(run.path, ranks)}"
    if ranks.first:
        print(words)
        print(json.dumps({"run": str(run.path), "status": info.get("status", "lost").replace("running", "lost")}))
    elif info.get("status") == "running":
        print(words, file=sys.stderr)
    return 1
