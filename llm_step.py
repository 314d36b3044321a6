"""One optimizer step of llm_train.py, and the metrics of a split: model and loss as the plan wants them.

The tensors that decide about the peak live and die here: logits are dropped before the backward pass, gradients after
the update. A step reads no number from the GPU (but in the scaler of fp16), so that the host runs ahead of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import prepare_for_compile
from checkpointing import run_blocks
from cross_entropy import cross_entropy, linear_cross_entropy
from dataset import TokenSplit
from llm_plan import Plan
from memory_tracker import MemoryTracker
from parallel import compile_blocks, eager, sending_gradients, wrap_model
from precision import autocast
from processes import ALONE, Ranks
from run_folder import Interrupted, StopRequest
from transformer_based_llm import TransformerLM

Batch = tuple[torch.Tensor, torch.Tensor]


def entry_of(plan: Plan) -> str:
    """The model's method that a training step calls."""
    return "forward" if plan.loss == "full" else "hidden_states"


class Objective:
    """The model and its loss as the plan wants them: which makes the logits, in which precision, compiled or not."""

    def __init__(self, model: TransformerLM, plan: Plan, ranks: Ranks = ALONE):
        self.model, self.plan, self.ranks = model, plan, ranks
        self.place = (0, 0)  # seed and step, from which the random numbers of a parallel run follow
        self.makes_logits = plan.loss == "full"
        self.plain = model if self.makes_logits else model.hidden_states  # neither compiled nor wrapped
        self.loss = self.full_loss if self.makes_logits else self.loss_without_logits
        if plan.use_compile:
            prepare_for_compile()
            if self.makes_logits:
                self.loss = torch.compile(cross_entropy, fullgraph=True)
        if ranks.method is None:
            self.forward = torch.compile(self.plain, fullgraph=True) if plan.use_compile else self.plain
        else:
            if plan.use_compile:
                compile_blocks(model, self.run_block)
                model.config = replace(model.config, gradient_checkpointing="none")  # it is inside the blocks now
            self.forward = wrap_model(model, ranks, plan.device, entry_of(plan))

    def run_block(self, index: int, forward: Callable) -> Callable:
        """A block's forward with the checkpointing that the model would put around it."""
        config = self.plan.model
        method = config.gradient_checkpointing
        if method == "every_k":
            method = "none" if index % config.checkpoint_every else "block"
        if method == "none":
            return forward
        return partial(run_blocks, [forward], method=method, random=config.dropout > 0)

    def sending_gradients(self, last: bool) -> AbstractContextManager:
        """Around a micro-batch: whether it is the last of its update, the one that sends gradients."""
        return sending_gradients(self.model, self.forward, self.ranks, last)

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
        with self.autocast(), eager(self.ranks, self.plan.use_compile):
            if self.makes_logits:
                logits = self.plain(inputs)
                losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").double()
            else:
                losses = self.loss_without_logits(self.plain(inputs), targets, "sum").double()
        self.model.train()
        return losses.sum()


def training_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: list[Batch],
    tracker: MemoryTracker,
    *,
    update: bool = True,
) -> torch.Tensor:
    """One optimizer step over one or more micro-batches; the gradient is that of the mean over all their tokens.

    Args:
        batches: this rank's inputs and targets, each (sequences, tokens) int64; the last may hold fewer sequences.
        update: False drops the gradients: everything runs but the optimizer.

    Returns:
        The mean loss in nats a token over all ranks, a scalar on the device, so that nobody has to wait for the GPU.
    """
    device, ranks = batches[0][0].device, objective.ranks
    sequences = sum(len(inputs) for inputs, _ in batches)
    total = torch.zeros((), device=device)
    ranks.reseed(*objective.place, "dropout")
    with tracker.phase("training_step"):
        for number, (inputs, targets) in enumerate(batches, start=1):
            with objective.sending_gradients(last=number == len(batches)):
                with tracker.phase("forward_pass"), objective.autocast():
                    output = objective.forward(inputs)  # logits, or hidden states where the loss makes the logits
                with tracker.phase("loss"), objective.autocast():
                    loss = objective.loss(output, targets)
                    loss = loss * (len(inputs) / sequences)
                del output  # otherwise the logits would live through the backward pass, next to their gradient
                with tracker.phase("backward_pass"):
                    scaler.scale(loss).backward()
            total += loss.detach()
        # Replicas that round stochastically must round alike; shards draw for themselves.
        ranks.reseed(*objective.place, "update", alike=ranks.method == "ddp")
        with tracker.phase("optimizer_step"):
            if update:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return ranks.mean(total)


def evaluate(objective: Objective, split: TokenSplit, batch_size: int, stop: StopRequest) -> dict[str, float]:
    """Loss, perplexity and bits per byte over every token of a split; no batch size changes them but by rounding.

    Each rank takes its slice of every batch. One whose slice is empty runs a window that does not count: under FSDP a
    forward pass is something that all ranks do.
    """
    context_length, device, ranks = objective.model.config.context_length, objective.plan.device, objective.ranks
    windows = split.num_windows(context_length)
    total = torch.zeros((), dtype=torch.float64, device=device)
    begins = range(0, windows, batch_size)
    for begin in tqdm(begins, desc=f"evaluating on {split.name}", leave=False, disable=not ranks.first):
        if any(ranks.agree(stop.signal is not None)):
            raise Interrupted
        numbers = np.arange(begin, min(begin + batch_size, windows))
        mine = ranks.mine(numbers)
        losses = objective.sum_of_losses(*split.batch(mine if len(mine) else numbers[:1], context_length, device))
        total += losses if len(mine) else 0
    rest = split.tail(context_length, device)
    if rest is not None:
        losses = objective.sum_of_losses(*rest)
        total += losses if ranks.first else 0
    total = ranks.sum(total)
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
