"""Heads removed from a PatchTST while it is trained: rounds of scoring, removing and training on.

`patchtst_train.py --prune dynamic` runs it after the ordinary training, from its best weights. What is reported:
`before` is that model, `after` the same rounds of removal without any training in between (what pruning itself does),
`further` the model that trained on after each removal and then until it stopped, at a tenth of the learning rate, the
custom when a trained model is trained on; validation chooses among the state right after the last removal and every
epoch from there. The control for it is the same with --prune_heads_per_layer 0: further training alone may help or
hurt.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import head_pruning
from head_pruning import attention_layers, head_numbers, remove_heads
from patchtst import PatchTST
from patchtst_fit import Best, Training
from precision import autocast
from utils import count_parameters

FURTHER_RATE = 0.1  # times the learning rate of the best epoch, for training on
SCORED_BATCHES = 8  # the last ones of the training windows judge the heads


def removals(heads: int, rounds: int) -> list[int]:
    """How many heads each round takes from a layer, as even as possible."""
    return [heads * (number + 1) // rounds - heads * number // rounds for number in range(rounds)]


def remove_lowest(training: Training, model: PatchTST, count: int, optimizer: Any) -> list[dict[str, Any]]:
    """Score the heads that are left on the last training windows and remove the `count` lowest of each layer.

    Args:
        training: for its data, settings and precision.
        model: that loses heads; `optimizer` loses their states, None if there is none.

    Returns:
        A row a layer: its heads that were removed, and the scores of all that were left before.
    """
    size, last = training.plan.batch_size, len(training.windows)
    numbers = torch.arange(max(0, last - SCORED_BATCHES * size), last, device=training.device)
    batches = [training.windows.batch(part) for part in numbers.split(size)]

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with autocast(training.plan.precision, training.device):
            forecast = model(batch[0])
        return F.mse_loss(forecast, batch[1])

    settings, rows = training.settings, []
    scores = head_pruning.importance(model, settings.prune_importance or "gradient", batches, loss)
    for place, (layer, score) in enumerate(zip(attention_layers(model), scores, strict=True)):
        chosen, left = head_pruning.lowest(score, layer, count), head_numbers(layer)
        remove_heads(layer, chosen, mode=settings.prune_mode or "structural", optimizer=optimizer)
        scored = {str(number): round(value, 6) for number, value in zip(left, score.tolist(), strict=True)}
        rows.append({"layer": place, "removed": chosen, "scores": scored})
    return rows


def prune_and_train_on(training: Training, before: Best, bar: tqdm) -> tuple[Best, str, dict[str, Any]]:
    """Remove heads round by round from the best weights, training on after each removal, then until it stops.

    Every removal is a line a layer in pruning.jsonl. Further training goes on at --prune_learning_rate, by default
    FURTHER_RATE times that of the epoch that the best weights come from.

    Returns:
        The best state after the last removal, why training ended, and the report: before, after, further.
    """
    plan, model, optimizer = training.plan, training.model, training.optimizer
    model.load_state_dict(before.weights)
    report = {"before": training.describe("validation", "test")}
    counts = removals(plan.heads_to_prune, plan.prune_rounds)
    alone = copy.deepcopy(model)
    for count in counts:
        remove_lowest(training, alone, count, None)
    report["after"] = {"parameters": count_parameters(alone)}
    for split in ("validation", "test"):
        report["after"] |= {f"{split}_{name}": value for name, value in training.evaluate(split, alone).items()}
    del alone
    optimizer.load_state_dict(before.optimizer)
    training.scheduler = None
    for group in optimizer.param_groups:
        group["lr"] = training.settings.prune_learning_rate or FURTHER_RATE * before.learning_rate
    for number, count in enumerate(counts, 1):
        rows = remove_lowest(training, model, count, optimizer)
        found = training.evaluate("validation")
        shared = {"round": number, "epoch": training.epoch, "validation_mse": found["mse"]}
        training.run.append("pruning.jsonl", [shared | row for row in rows])
        training.build()
        if number < len(counts):
            training.fit(training.settings.prune_every_epochs or 1, None, bar)
    training.track_from, training.tracker.rows = training.step + 1, []
    first = len(training.laps)
    best, outcome = training.fit(plan.epochs, plan.patience, bar, start=training.remember(found["mse"]))
    model.load_state_dict(best.weights)
    report["further"] = training.describe("validation", "test", laps=training.laps[first:])
    return best, outcome, report
