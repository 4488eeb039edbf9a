"""The parts of a layer that need neither Transformer Engine nor a GPU: norms and attention, in plain torch.

Attention uses torch's own kernels, which on a GPU are the flash ones.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, the mean in float32, over the last dimension.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467. Megatron-Core's own refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / sqrt(mean(x ** 2) + eps) * (1 + weight), all in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class GatedAttention(SelfAttention):
    """Attention whose output is multiplied by a sigmoid of the layer's input, before it is projected.

    Megatron-Core's own has this product compiled, which takes a compiler at run time.
    """

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """
        Args:
            x: [tokens, rows, heads * head size].
            gate: the same, in any shape.
        """
        return x * torch.sigmoid(gate.reshape(x.shape))


class CausalAttention(MegatronModule):
    """Softmax attention of each position over itself and those before it.

    Rows are padded at the right, where no real token looks: no mask is needed.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_unused: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_unused: Any, **_also_unused: Any
    ) -> Tensor:
        """
        Args:
            query: [tokens, rows, heads, head size].
            key, value: [tokens, rows, key-value heads, head size].

        Returns:
            [tokens, rows, heads * head size].
        """
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=query.shape[2] != key.shape[2]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
