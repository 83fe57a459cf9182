"""What each token passes by itself in a block: a gated feed-forward block, or a few of many such, chosen by a router.

Shapes: B batch, T tokens, N tokens of all rows, D hidden_size, E experts, C chosen experts.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.model.config import Experts, ModelConfig
from kubetune_trainer.model.decoding import Fused
from kubetune_trainer.model.linear import Linear
from kubetune_trainer.model.recompute import made_again


def build_feed_forward(config: ModelConfig, experts: Experts | None) -> nn.Module:
    """Build what the config asks for; `experts` is None for a layer without any."""
    if experts is not None:
        return MixtureOfExperts(config, experts)
    if config.fused_projections:
        return FusedMLP(config)
    return MLP(config, intermediate_size=config.intermediate_size)


class MLP(nn.Module):
    """Gated feed-forward block (SwiGLU and GeGLU, arXiv 2002.05202)."""

    fused: Fused | None = None
    """Gate and up as one, while the model writes."""

    def __init__(self, config: ModelConfig, *, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.is_gelu = config.activation == "gelu_tanh"

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        if self.fused is not None:
            gate, up = self.fused(x_BTD).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        return self.down_proj(gated(gate, up, is_gelu=self.is_gelu))


class FusedMLP(nn.Module):
    """The same with gate and up in one projection, in this order, as Phi-3 has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.is_gelu = config.activation == "gelu_tanh"

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        gate, up = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(gated(gate, up, is_gelu=self.is_gelu))


class MixtralExpert(nn.Module):
    """The same with the names of Mixtral's experts: w1 is the gate, w3 up and w2 down."""

    def __init__(self, config: ModelConfig, *, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, intermediate_size, bias=False)
        self.w2 = Linear(intermediate_size, config.hidden_size, bias=False)
        self.w3 = Linear(config.hidden_size, intermediate_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        return self.w2(gated(self.w1(x_BTD), self.w3(x_BTD)))


class Router(nn.Module):
    """Chooses experts. No linear layer to adapters and quantization, as it is none to peft with transformers 5."""

    def __init__(self, hidden_size: int, experts: Experts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.num_experts, hidden_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear begins
        self.num_chosen, self.normalized = experts.num_chosen, experts.normalized

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, fp32, and the numbers of each token's experts, both (N, C)."""
        probabilities_NE = functional.linear(x_ND, self.weight.to(x_ND.dtype)).float().softmax(dim=-1)
        weights_NC, chosen_NC = probabilities_NE.topk(self.num_chosen, dim=-1)
        if self.normalized:
            weights_NC = weights_NC / weights_NC.sum(dim=-1, keepdim=True)
        return weights_NC, chosen_NC


class MixtureOfExperts(nn.Module):
    """Feed-forward blocks of which each token passes a few (arXiv 2101.03961, without a limit to an expert's tokens).

    Every expert computes in training, even of no token: its gradient is zero then, and under FSDP no rank waits for one
    that left it out.
    """

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.gate = Router(config.hidden_size, experts)
        kind = MLP if experts.names == "Qwen" else MixtralExpert
        self.experts = nn.ModuleList(
            kind(config, intermediate_size=experts.intermediate_size) for _ in range(experts.num_experts)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each token by itself."""
        x_ND = x_BTD.flatten(0, -2)
        weights_NC, chosen_NC = self.gate(x_ND)
        by_expert = chosen_NC.flatten().argsort(stable=True)
        counts = chosen_NC.flatten().bincount(minlength=len(self.experts)).tolist()
        given = x_ND[by_expert // chosen_NC.shape[1]].split(counts)
        outs = [
            expert(tokens)
            for expert, tokens in zip(self.experts, given, strict=True)
            if len(tokens) or torch.is_grad_enabled()
        ]
        # Put back by a permutation and summed in each token's own order: the same numbers every time, on a GPU too.
        out_NCD = torch.cat(outs)[by_expert.argsort()].unflatten(0, chosen_NC.shape)
        return (out_NCD * weights_NC[..., None]).sum(dim=1).to(x_BTD.dtype).view_as(x_BTD)


def gated(gate: Tensor, up: Tensor, *, is_gelu: bool = False) -> Tensor:
    """Multiply with an activated gate."""
    if gate.requires_grad or up.requires_grad:
        product: Tensor = _Gated.apply(gate, up, is_gelu)
        return made_again(product, partial(gated, gate.detach(), up.detach(), is_gelu=is_gelu))
    return _activate(gate, is_gelu=is_gelu) * up


class _Gated(torch.autograd.Function):
    """The same, which activates again in backward instead of keeping what the activation returned."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, is_gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.is_gelu = is_gelu
        return _activate(gate, is_gelu=is_gelu) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        of_active = gradient * up
        if ctx.is_gelu:
            of_gate = torch.ops.aten.gelu_backward(of_active, gate, approximate="tanh")
        else:
            of_gate = torch.ops.aten.silu_backward(of_active, gate)
        return of_gate, gradient * _activate(gate, is_gelu=ctx.is_gelu), None


def _activate(gate: Tensor, *, is_gelu: bool) -> Tensor:
    return functional.gelu(gate, approximate="tanh") if is_gelu else functional.silu(gate)
