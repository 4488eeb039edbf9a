"""Linear attention by the gated delta rule, a layer's heads spread over the tensor group.

Source: Yang et al. 2024, arXiv:2412.06464. For each head a state S of [key size, value size], and for each token

    S = exp(g) S,     S = S + k (beta (v - S^T k))^T,     out = S^T q

so a token sees those before it only, and padding at a row's right does no harm. The recurrence is Transformers' own: in
plain torch, or by flash-linear-attention where that is installed. Each rank has whole key heads, and the value heads
that use them; between ranks only the projections' inputs and outputs travel.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from twinkle_megatron.groups import Groups
from twinkle_megatron.layers import RMSNorm

# Whose recurrence this is, as Qwen3.5's; only loaded for models that have one.
_TRANSFORMERS = "transformers.models.qwen3_next.modeling_qwen3_next"

# Tokens that it computes together.
_CHUNK = 64


def sections(hf: PretrainedConfig) -> tuple[int, int, int]:
    """Features of q, k and v, which `in_proj_qkv` and `conv1d` hold behind each other."""
    keys = hf.linear_num_key_heads * hf.linear_key_head_dim
    return keys, keys, hf.linear_num_value_heads * hf.linear_value_head_dim


def token_bytes(hf: PretrainedConfig) -> int:
    """Bytes that one more token of a training pass takes, beside what any attention takes: q, k and v, and these times
    beta and decay, a row of each of four matrices of a chunk, all in float32.
    """
    keys, values = int(hf.linear_key_head_dim), int(hf.linear_value_head_dim)
    return 4 * hf.linear_num_value_heads * (4 * keys + 6 * values + 4 * _CHUNK)


class GatedDeltaNet(MegatronModule):
    """In the place of a layer's attention.

    Attributes:
        in_proj: column-parallel; of each rank's heads q, k, v, z (the output's gate), b (beta) and a (of the decay).
        conv1d: [features of q, k and v, 1, width], causal, each feature by itself.
        A_log, dt_bias: [value heads], of the decay.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        hf: PretrainedConfig,
        groups: Groups,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        ranks = groups.tensor.size
        self._key_size, self._value_size = int(hf.linear_key_head_dim), int(hf.linear_value_head_dim)
        self._value_heads = hf.linear_num_value_heads // ranks
        self._repeats = hf.linear_num_value_heads // hf.linear_num_key_heads
        whole = sections(hf)
        self._sections = [size // ranks for size in whole]
        dtype = config.params_dtype
        linear: dict[str, Any] = {"config": config, "bias": False, "tp_group": groups.tensor.ranks}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size,
            sum(whole) + whole[2] + 2 * hf.linear_num_value_heads,
            init_method=cast("Any", config.init_method),
            gather_output=False,
            **linear,
        )
        self.conv1d = nn.Conv1d(
            sum(self._sections),
            sum(self._sections),
            hf.linear_conv_kernel_dim,
            groups=sum(self._sections),
            bias=False,
            dtype=dtype,
        )
        self.dt_bias = nn.Parameter(torch.empty(self._value_heads, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(self._value_heads, dtype=dtype))
        self.out_norm = RMSNorm(config, self._value_size, eps=config.layernorm_epsilon)
        self.out_proj = RowParallelLinear(
            whole[2],
            config.hidden_size,
            init_method=cast("Any", config.output_layer_init_method),
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        self._functions = cast("Any", importlib.import_module(_TRANSFORMERS))

    def forward(self, hidden: Tensor, *_unused: Any, **_also_unused: Any) -> tuple[Tensor, None]:
        """[tokens here, rows, hidden] to the same."""
        projected, _ = cast("tuple[Tensor, None]", self.in_proj(hidden))
        x = projected.transpose(0, 1)  # [rows, tokens, features] from here on
        heads = self._value_heads
        mixed, z, b, a = x.split([sum(self._sections), self._sections[2], heads, heads], dim=-1)
        q, k, v = self._convolved(mixed).split(self._sections, dim=-1)
        q, k = (
            part.unflatten(-1, (-1, self._key_size)).repeat_interleave(self._repeats, dim=2)
            for part in (q, k)
        )
        v, z = (part.unflatten(-1, (heads, self._value_size)) for part in (v, z))
        out, _ = self._functions.torch_chunk_gated_delta_rule(
            q,
            k,
            v,
            g=-self.A_log.float().exp() * functional.softplus(a.float() + self.dt_bias),
            beta=b.sigmoid(),
            initial_state=None,
            output_final_state=False,
            use_qk_l2norm_in_kernel=True,
        )
        gated = self.out_norm(out) * functional.silu(z.float())
        result, _ = self.out_proj(gated.to(hidden.dtype).flatten(2).transpose(0, 1).contiguous())
        return cast("Tensor", result), None

    def _convolved(self, x: Tensor) -> Tensor:
        """Each token's features with those of the tokens before it: [rows, tokens, features] to the same."""
        width = self.conv1d.kernel_size[0]
        return functional.silu(self.conv1d(functional.pad(x.transpose(1, 2), (width - 1, 0)))).transpose(1, 2)
