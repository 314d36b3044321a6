"""One optimizer step of llm_train.py, and the metrics of a split: model and loss as the plan wants them.

The tensors that decide about the peak live and die here: logits are dropped before the backward pass, gradients after
the update. A step reads no number from the GPU (but in the scaler of fp16), so that the host runs ahead of it.
"""

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import prepare_for_compile
from cross_entropy import cross_entropy, linear_cross_entropy
from dataset import TokenSplit
from llm_plan import Plan
from memory_tracker import MemoryTracker
from precision import autocast
from run_folder import StopRequest
from transformer_based_llm import TransformerLM

Batch = tuple[torch.Tensor, torch.Tensor]


class Objective:
    """The model and its loss as the plan wants them: which makes the logits, in which precision, compiled or not."""

    def __init__(self, model: TransformerLM, plan: Plan):
        self.model, self.plan = model, plan
        self.makes_logits = plan.loss == "full"
        self.forward = model if self.makes_logits else model.hidden_states
        self.loss = self.full_loss if self.makes_logits else self.loss_without_logits
        if plan.use_compile:
            prepare_for_compile()
            self.forward = torch.compile(self.forward, fullgraph=True)
            if self.makes_logits:
                self.loss = torch.compile(cross_entropy, fullgraph=True)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.plan.autocast_precision, self.plan.device)

    def full_loss(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        return cross_entropy(logits, targets, reduction)

    def loss_without_logits(self, hidden: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        plan = self.plan
        options = {"loss": plan.loss, "chunk_tokens": plan.loss_chunk_tokens, "compiled": plan.use_compile}
        return linear_cross_entropy(hidden, self.model.head.weight, targets, reduction=reduction, **options)

    @torch.no_grad()
    def sum_of_losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the tokens' losses in nats (fp64 scalar on the device), without dropout, never compiled."""
        self.model.eval()
        with self.autocast():
            if self.makes_logits:
                logits = self.model(inputs)
                losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").double()
            else:
                losses = self.loss_without_logits(self.model.hidden_states(inputs), targets, "sum").double()
        self.model.train()
        return losses.sum()


def training_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[Batch],
    tracker: MemoryTracker,
) -> torch.Tensor:
    """One optimizer step over one or more micro-batches; the gradient is that of the mean over all their tokens.

    Args:
        batches: inputs and targets, each (sequences, tokens) int64; the last may hold fewer sequences.

    Returns:
        The mean loss in nats a token, a scalar on the device, so that nobody has to wait for the GPU.
    """
    device = batches[0][0].device
    sequences = sum(len(inputs) for inputs, _ in batches)
    total = torch.zeros((), device=device)
    with tracker.phase("training_step"):
        for inputs, targets in batches:
            with tracker.phase("forward_pass"), objective.autocast():
                output = objective.forward(inputs)  # logits, or hidden states where the loss makes the logits
            with tracker.phase("loss"), objective.autocast():
                loss = objective.loss(output, targets)
                loss = loss * (len(inputs) / sequences)
            del output  # otherwise the logits would live through the backward pass, next to their gradient
            with tracker.phase("backward_pass"):
                scaler.scale(loss).backward()
            total += loss.detach()
        with tracker.phase("optimizer_step"):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return total


def evaluate(objective: Objective, split: TokenSplit, batch_size: int, stop: StopRequest) -> dict[str, float]:
    """Loss, perplexity and bits per byte over every token of a split; no batch size changes them but by rounding."""
    context_length, device = objective.model.config.context_length, objective.plan.device
    windows = split.num_windows(context_length)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for begin in tqdm(range(0, windows, batch_size), desc=f"evaluating on {split.name}", leave=False):
        stop.check()
        numbers = np.arange(begin, min(begin + batch_size, windows))
        total += objective.sum_of_losses(*split.batch(numbers, context_length, device))
    rest = split.tail(context_length, device)
    if rest is not None:
        total += objective.sum_of_losses(*rest)
    tokens = len(split.tokens) - 1  # every token but the first is predicted
    nats = total.item()
    return {
        "loss": nats / tokens,
        "perplexity": float(np.exp(nats / tokens)),
        "bits_per_byte": nats / np.log(2) / split.num_bytes,
        "tokens": tokens,
    }


def unigram_perplexity(train: TokenSplit, split: TokenSplit, vocab_size: int) -> float:
    """The control of every perplexity: a model without context, the training split's token counts plus one."""

    def count(tokens: np.ndarray) -> np.ndarray:  # in pieces: bincount makes 8 bytes of each token
        pieces = (tokens[begin : begin + 2**24] for begin in range(0, len(tokens), 2**24))
        return sum(np.bincount(piece, minlength=vocab_size) for piece in pieces)

    probabilities = (count(train.tokens) + 1) / (len(train.tokens) + vocab_size)
    predicted = count(split.tokens[1:])  # every token but the first
    return float(np.exp(-(predicted @ np.log(probabilities)) / predicted.sum()))
