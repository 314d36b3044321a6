"""AdamW on bf16 parameters, computed in fp32: with an fp32 master copy, or all bf16 with stochastic rounding.

The optimizer behind `bf16_master` and `bf16_stochastic` of optimizers.py, which says what each saves and measures it.

bf16 keeps 8 bits of mantissa. An update below 1/512 of a weight is rounded away, and with beta2 = 0.999 the second
moment stands still too: its step of a thousandth is below half a unit in the last place. A master copy adds the updates
up in fp32 (12 bytes of states a parameter). Stochastic rounding needs no copy (4 bytes of states): it rounds up with
the probability of what was cut off, so that small updates arrive on average.

When it does not help: the rounding is noise of up to 1/128 of a weight at each step. With a very small learning rate
the noise, not the gradient, moves the weights; then keep the master copy.

Source: Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv 2010.06192; Loshchilov and Hutter 2017, Decoupled
Weight Decay Regularization, arXiv 1711.05101.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

BETAS, EPSILON = (0.9, 0.999), 1e-8
ELEMENTS_PER_PROGRAM = 2048  # of the CUDA kernel


def to_bfloat16(parameter: nn.Parameter) -> torch.Tensor:
    """Make a parameter bf16 in place and return the values it had (a parameter that is bf16 already: their copy)."""
    if parameter.grad is not None or parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("bf16 parameters are made of fp32 (or bf16) ones that have no gradient yet")
    if parameter.dtype == torch.bfloat16:
        return parameter.detach().float()
    before = parameter.data
    parameter.data = before.to(torch.bfloat16)
    return before


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor sharded over processes this one's part, otherwise the tensor; the update is elementwise."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def stochastic_round(values: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean; infinite and NaN stay.

    A bf16 number is the upper half of an fp32 number: a uniform 16-bit integer added to the lower half carries into the
    upper one with just that probability. Random numbers are those of PyTorch's generator.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)  # exact: the lower half is zero


def adamw_update(
    value: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    weight_decay: float,
) -> None:
    """AdamW's step `step` (from 1) in place; all four fp32 of one shape; the operations of torch.optim.AdamW."""
    value.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    denominator = exp_avg_sq.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
    value.addcdiv_(exp_avg, denominator, value=-lr / (1 - BETAS[0] ** step))


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters, computed in fp32: with an fp32 master copy, or all bf16 with stochastic rounding.

    States: step (int), exp_avg and exp_avg_sq (fp32 with a master copy, else bf16), master (fp32). On a GPU one Triton
    kernel updates all parameters; elsewhere `adamw_update` runs for one after the other. Stochastic rounding draws its
    noise, or the kernel's seed, from PyTorch's CPU generator, so a seed or a restored random state repeats it.

    Args:
        params: fp32 parameters become bf16 in place; contiguous.
        lr, weight_decay: as in torch.optim.AdamW (betas 0.9 and 0.999, eps 1e-8).
        master: keep an fp32 copy that the updates add up in.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, *, master: bool):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.master = master
        self.tables: dict[
            tuple[int, ...], tuple[list[int], torch.Tensor, torch.Tensor]
        ] = {}  # the kernel's, see launch
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if not parameter.is_contiguous():
                raise ValueError("LowPrecisionAdamW needs contiguous parameters")
            values = to_bfloat16(parameter)
            if master:
                self.state[parameter]["master"] = values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the fp32 states to the parameters' bf16; here they keep their type."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device) if torch.is_tensor(value) else value

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("LowPrecisionAdamW takes no closure")
        for group in self.param_groups:
            alike: dict[tuple[int, bool], dict[nn.Parameter, list[int]]] = {}  # what one launch can update
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "step" not in state:
                    dtype = torch.float32 if self.master else torch.bfloat16
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
                state["step"] += 1
                if parameter.device.type == "cuda":
                    row = self.row(parameter)
                    aligned = all(number % 16 == 0 for number in row)
                    alike.setdefault((state["step"], aligned), {})[parameter] = row
                else:
                    self.update(parameter, state, group)
            for (step, aligned), rows in alike.items():
                self.launch(rows, step, aligned, group)

    def update(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One parameter by plain PyTorch: the reference of the kernel."""
        gradient = local(parameter.grad).float()
        first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
        if self.master:
            kept = [local(state["master"]), first, second]
            adamw_update(kept[0], gradient, *kept[1:], state["step"], group["lr"], group["weight_decay"])
            local(parameter).copy_(kept[0])
        else:
            kept = [local(parameter), first, second]
            exact = [tensor.float() for tensor in kept]
            adamw_update(exact[0], gradient, *exact[1:], state["step"], group["lr"], group["weight_decay"])
            for tensor, values in zip(kept, exact, strict=True):
                tensor.copy_(stochastic_round(values))

    def row(self, parameter: nn.Parameter) -> list[int]:
        """The addresses the kernel works on, and the number of elements (in place of the master copy: 0)."""
        if not local(parameter.grad).is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        state = self.state[parameter]
        tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        master = local(state["master"]).data_ptr() if self.master else 0
        return [*(local(tensor).data_ptr() for tensor in tensors), master, local(parameter).numel()]

    def launch(self, rows: dict[nn.Parameter, list[int]], step: int, aligned: bool, group: dict[str, Any]) -> None:
        """One kernel for all the parameters: a table of addresses, and for each program a row and a block of it."""
        device = next(iter(rows)).device
        addresses = [number for row in rows.values() for number in row]
        key = tuple(map(id, rows))
        known = self.tables.get(key)
        if known is None or known[0] != addresses:  # gradients often lie where they lay in the last step
            table = torch.tensor(addresses).pin_memory().to(device, non_blocking=True)
            if known is None:
                counts = torch.tensor([-(-row[-1] // ELEMENTS_PER_PROGRAM) for row in rows.values()])
                row_numbers = torch.arange(len(rows)).repeat_interleave(counts)
                blocks = torch.arange(len(row_numbers)) - (counts.cumsum(0) - counts)[row_numbers]
                programs = torch.stack([row_numbers, blocks], 1).to(device, torch.int32)  # (programs, 2)
            else:
                programs = known[2]
            known = self.tables[key] = (addresses, table, programs)
        _, table, programs = known
        seed = 0 if self.master else int(torch.randint(2**31 - 1, ()))
        with torch.cuda.device(device):
            adamw_kernel()[(len(programs),)](
                table,
                programs,
                seed,
                1 - group["lr"] * group["weight_decay"],
                1 - BETAS[0],
                BETAS[1],
                1 - BETAS[1],
                (1 - BETAS[1] ** step) ** -0.5,
                group["lr"] / (1 - BETAS[0] ** step),
                EPSILON,
                MASTER=self.master,
                ALIGNMENT=16 if aligned else 1,
                BLOCK=ELEMENTS_PER_PROGRAM,
                num_warps=8,
            )


@functools.cache
def adamw_kernel() -> Any:
    """The Triton kernel of LowPrecisionAdamW; made at first use, since only a GPU needs Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(values, noise):
        """fp32 to bf16 as `stochastic_round`, with the lower 16 bits of `noise`."""
        bits = values.to(tl.int32, bitcast=True)
        carried = ((bits + (noise & 0xFFFF).to(tl.int32)) & -65536).to(tl.float32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, carried, values).to(tl.bfloat16)

    @triton.jit(do_not_specialize=["seed"])
    def kernel(
        table,  # (tensors, 6) int64: parameter, gradient, exp_avg, exp_avg_sq, master, elements
        programs,  # (programs, 2) int32: row of the table, block of that tensor
        seed,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        second_scale,
        step_size,
        epsilon,
        MASTER: tl.constexpr,
        ALIGNMENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.load(programs + 2 * tl.program_id(0)).to(tl.int64)
        block = tl.load(programs + 2 * tl.program_id(0) + 1).to(tl.int64)
        entry = table + 6 * row
        elements = tl.multiple_of(tl.load(entry + 5), ALIGNMENT)
        places = block * BLOCK + tl.arange(0, BLOCK)
        inside = places < elements
        moment_type = tl.float32 if MASTER else tl.bfloat16
        parameter = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.bfloat16)), ALIGNMENT) + places
        gradient = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(tl.bfloat16)), ALIGNMENT) + places
        first = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(moment_type)), ALIGNMENT) + places
        second = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(moment_type)), ALIGNMENT) + places
        master = tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(tl.float32)), ALIGNMENT) + places
        kept = master if MASTER else parameter
        g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(second, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(kept, mask=inside, other=0.0).to(tl.float32) * decay
        m += (g - m) * one_minus_beta1
        v = v * beta2 + g * g * one_minus_beta2
        x -= step_size * m / (tl.sqrt(v) * second_scale + epsilon)
        if MASTER:
            tl.store(master, x, mask=inside)
            tl.store(first, m, mask=inside)
            tl.store(second, v, mask=inside)
            tl.store(parameter, x.to(tl.bfloat16), mask=inside)
        else:
            # 7 rounds of Philox pass the same statistical tests as 10; every tensor has its own stream
            noise, noise_first, noise_second, _ = tl.randint4x(seed + row, places, n_rounds=7)
            tl.store(parameter, rounded(x, noise), mask=inside)
            tl.store(first, rounded(m, noise_first), mask=inside)
            tl.store(second, rounded(v, noise_second), mask=inside)

    return kernel
