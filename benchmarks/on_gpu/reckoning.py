"""What a model's work comes to: operations of a training step, bytes of a decode step, and what a device could do.

Model FLOP utilization (MFU) is that of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): the operations that
the model needs, over the device's peak; what is computed twice to save memory does not count. Here the base is frozen,
so that its weights get no gradient, and attention is causal. A token's operations in a training step are

    4 N                   N weights of the base that it is multiplied with, forward, and backward to the inputs
    6 A                   A numbers of its adapter: forward, and both gradients
    6 L (T + 1) q         scores and values in L layers of full attention, q = heads x head size, T tokens a row: each
                          sees (T + 1) / 2 on average, forward, and twice as much backward
    18 R h k v            the recurrence in R layers of linear attention, h heads with states of k x v: decay and read,
                          write, query; forward, and twice as much backward

where a multiplication and the addition that follows are two operations.

A decode step reads the weights once, the adapters in use once, and what the layers keep of each sequence once; states
of linear attention are written too. The time of that at the memory's bandwidth is its roofline (Williams et al. 2009,
doi:10.1145/1498765.1498785): at such batch sizes a step has far fewer operations a byte than the device could do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from twinkle.server.backends.hf.threads import matrix_weights


@dataclass(frozen=True)
class Peak:
    """By a device's data sheet.

    Attributes:
        flops: FLOP/s of dense products in bfloat16.
        bandwidth: bytes/s of its memory.
    """

    flops: float
    bandwidth: float


# By a part of the name that torch gives; NVIDIA's data sheets of the SXM parts.
_PEAKS = {
    "H200": Peak(989e12, 4.8e12),
    "H100 80GB HBM3": Peak(989e12, 3.35e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
}


def peak_of(device_name: str) -> Peak | None:
    """None for a device that is not known here."""
    return next((peak for part, peak in _PEAKS.items() if part in device_name), None)


@dataclass(frozen=True)
class Work:
    """Sizes of a model that its work follows from.

    Attributes:
        weights: that a token is multiplied with, the head's included.
        itemsize: bytes of a weight, and of a number in the cache.
        full_layers, query_width: layers of full attention, and heads x head size in them.
        kv_width: key-value heads x head size.
        linear_layers, linear_heads, key_dim, value_dim: layers of linear attention, and their value heads' states.
        conv_numbers: that the short convolution of such a layer keeps of a sequence.
    """

    weights: int
    itemsize: int
    full_layers: int
    query_width: int
    kv_width: int
    linear_layers: int = 0
    linear_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_numbers: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        config: Any = model.config.get_text_config()
        linear = linear_layers(config)
        found = cls(
            weights=matrix_weights(model),
            itemsize=model.dtype.itemsize,
            full_layers=config.num_hidden_layers - linear,
            query_width=config.num_attention_heads * config.head_dim,
            kv_width=config.num_key_value_heads * config.head_dim,
        )
        if not linear:
            return found
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return cls(
            *(found.weights, found.itemsize, found.full_layers, found.query_width, found.kv_width),
            linear_layers=linear,
            linear_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            conv_numbers=(2 * keys + values) * config.linear_conv_kernel_dim,
        )

    def training_flops(self, adapter_numbers: int, length: int) -> float:
        """Operations of one token in a training step.

        Args:
            adapter_numbers: of A and B of all layers of its adapter.
            length: tokens of its row.
        """
        attention = 6 * self.full_layers * (length + 1) * self.query_width
        recurrence = 18 * self.linear_layers * self.linear_heads * self.key_dim * self.value_dim
        return 4 * self.weights + 6 * adapter_numbers + attention + recurrence

    def decode_bytes(self, sequences: int, context: float, adapters: int, adapter_numbers: int) -> float:
        """Bytes that a decode step moves at least.

        Args:
            context: tokens in the cache, the mean over sequences and steps.
            adapters: in use.
        """
        weights = (self.weights + adapters * adapter_numbers) * self.itemsize
        cache = self.full_layers * 2 * self.kv_width * context * self.itemsize
        state = 4 * self.linear_heads * self.key_dim * self.value_dim  # kept in float32
        states = self.linear_layers * 2 * (state + self.conv_numbers * self.itemsize)
        return weights + sequences * (cache + states)


def linear_layers(config: PreTrainedConfig) -> int:
    """How many layers have linear attention."""
    return list(getattr(config, "layer_types", None) or []).count("linear_attention")
