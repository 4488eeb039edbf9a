"""Expert parallelism with low-rank terms of many adapters on each expert.

Each token is sent, with its adapter's number, to the ranks that hold its experts. They compute their experts for all
tenants' tokens together and send the outputs back. (Megatron-Core's own layer loses track of a token's adapter when it
sorts tokens by expert.)
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from twinkle.server.backends.lora.experts import DOWN, GATE_UP, ExpertTerm, run_experts
from twinkle_megatron.architecture import shared_expert_size
from twinkle_megatron.collectives import exchange_rows
from twinkle_megatron.groups import Group, Groups
from twinkle_megatron.lora import ForwardContext, ShardSegment


class Router(nn.Module):
    """Top-k routing, as in Transformers' `Qwen3MoeTopKRouter` and `Qwen3_5MoeTopKRouter`."""

    def __init__(self, config: TransformerConfig, hf: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hf.num_experts, hf.hidden_size, dtype=config.params_dtype))
        self._k = hf.num_experts_per_tok
        self._adds_up_to_one = hf.model_type == "qwen3_5_moe_text" or hf.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, hidden] to experts, int64 [n, k], and their weights [n, k]."""
        probabilities = functional.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self._k, dim=-1)
        if self._adds_up_to_one:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return experts, weights.to(x.dtype)


class SharedExpert(nn.Module):
    """The expert that all tokens go to, spread over the tensor group as a dense feed-forward block is.

    Attributes:
        gate: [1, hidden], by whose sigmoid its output is multiplied.
    """

    def __init__(self, config: TransformerConfig, hf: PretrainedConfig, dense: ModuleSpec) -> None:
        super().__init__()
        own = copy.copy(config)
        own.ffn_hidden_size = shared_expert_size(hf)
        self.mlp = cast("nn.Module", build_module(dense, config=own, ffn_hidden_size=own.ffn_hidden_size))
        self.gate = nn.Parameter(torch.empty(1, hf.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens here, rows, hidden] to the same."""
        out, _ = self.mlp(hidden)
        return functional.linear(hidden, self.gate).sigmoid() * out


class RoutedExperts(nn.Module):
    """A layer's feed-forward block. Call `attach` before use.

    Attributes:
        shared: None if tokens go to routed experts alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf: PretrainedConfig,
        groups: Groups,
        dense: ModuleSpec,
        **_unused: Any,
    ) -> None:
        """
        Args:
            dense: how a feed-forward block that is spread over the tensor group is built.
        """
        super().__init__()
        count, inner = hf.num_experts // groups.expert.size, hf.moe_intermediate_size
        dtype = config.params_dtype
        self.first_expert = groups.expert.index * count
        self.router = Router(config, hf)
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hf.hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(count, hf.hidden_size, inner, dtype=dtype))
        self.shared = SharedExpert(config, hf, dense) if shared_expert_size(hf) else None
        self._expert = groups.expert
        self._name = ""
        self._context = ForwardContext()

    def attach(self, name: str, context: ForwardContext) -> None:
        """
        Args:
            name: of the experts in Transformers, such as `model.layers.0.mlp.experts`.
        """
        self._name = name
        self._context = context

    def forward(self, hidden: Tensor, **_unused: Any) -> tuple[Tensor, None]:
        """[tokens here, rows, hidden] to the same."""
        x = hidden.reshape(-1, hidden.shape[-1])
        experts, weights = self.router(x)
        adapters = _adapter_of_token(self._context.segments, hidden)
        if self._expert.size == 1:
            terms = _terms(self._context.segments, self._name, adapters)
            out = run_experts(x, experts, self.gate_up_proj, self.down_proj, functional.silu, terms)
        else:
            out = self._on_their_ranks(x, experts, adapters)
        mixed = (out * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype).view_as(hidden)
        return mixed if self.shared is None else mixed + self.shared(hidden), None

    def _on_their_ranks(self, x: Tensor, experts: Tensor, adapters: Tensor) -> Tensor:
        """[n, hidden] and experts [n, k] to the experts' outputs, [n, k, hidden]."""
        k = experts.shape[1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        token = order // k
        count = len(self.gate_up_proj)
        sent = torch.bincount(flat // count, minlength=self._expert.size)
        received = _exchange_counts(sent, self._expert)
        there, back = (cast("list[int]", counts.tolist()) for counts in (sent, received))
        rows = exchange_rows(x.index_select(0, token), there, back, self._expert)
        labels = torch.stack([flat[order] % count, adapters[token]], dim=1)
        own, whose = exchange_rows(labels, there, back, self._expert).unbind(1)
        terms = _terms(self._context.segments, self._name, whose)
        out = run_experts(rows, own, self.gate_up_proj, self.down_proj, functional.silu, terms)
        returned = exchange_rows(out, back, there, self._expert)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return returned.index_select(0, inverse).view(*experts.shape, -1)


def _adapter_of_token(segments: list[ShardSegment], hidden: Tensor) -> Tensor:
    """int64 [tokens * rows]: adapters numbered across segments; -1: none."""
    codes: list[Tensor] = []
    first = 0
    for segment in segments:
        codes.append(segment.adapter_of_row + first)
        first += segment.adapters
    tokens, rows = hidden.shape[:2]
    if not any(len(code) for code in codes):
        return torch.full((tokens * rows,), -1, dtype=torch.int64, device=hidden.device)
    return torch.cat(codes).repeat(tokens)


def _terms(segments: list[ShardSegment], name: str, whose: Tensor) -> list[ExpertTerm]:
    """The terms for tokens with these adapters, numbered as in `_adapter_of_token`."""
    gate_up, down = f"{name}.{GATE_UP}", f"{name}.{DOWN}"
    terms: list[ExpertTerm] = []
    first = 0
    for segment in segments:
        end = first + segment.adapters
        if gate_up in segment.a:
            rows = ((whose >= first) & (whose < end)).nonzero().flatten()
            matrices = (segment.a[gate_up], segment.b[gate_up], segment.a[down], segment.b[down])
            terms.append(ExpertTerm(rows, whose[rows] - first, *matrices))
        first = end
    return terms


def _exchange_counts(sent: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.ranks)
    return received
