"""TensorBoard event files beside steps.jsonl: the same numbers, for those who watch their runs there.

    python llm_train.py --tensorboard true
    tensorboard --logdir outputs/llm                  every run below the folder is a line (uv sync --extra tensorboard)

steps.jsonl stays what figures and tables are made from, and can be followed without any package: `tail -f` shows each
step some two seconds after it has ended.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INSTALL = "tensorboard is not installed; install it with `uv sync --extra tensorboard`"


def missing_reason() -> str | None:
    """Why no event files can be written; None if they can."""
    return INSTALL if importlib.util.find_spec("tensorboard") is None else None


class TensorBoardLog:
    """Writes rows of steps.jsonl as scalars: one tag a key, the row's `step` on the x axis, null left out.

    Args:
        folder: the run's; the events lie in its folder tensorboard/.
        done_steps: what an earlier process has logged; later points of it (after its checkpoint) are no longer shown.

    Raises:
        ImportError: tensorboard is not installed (see `missing_reason`).
    """

    def __init__(self, folder: Path, done_steps: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=done_steps + 1)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows and flush."""
        for row in rows:
            for key, value in row.items():
                if key != "step" and value is not None:
                    self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()
