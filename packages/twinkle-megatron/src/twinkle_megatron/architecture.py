"""Which models Megatron-Core can hold here, and how it is configured for them: a Hugging Face configuration in, a
`TransformerConfig` out, or a refusal with the reason.

Llama, Qwen2, Qwen3, Qwen3-Next, Qwen3.5 and their mixtures of experts; other families of Llama's kind through
Megatron-Bridge, see `bridge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf import base_folder
from twinkle.server.backends.hf.base_model import DTYPES, LOADING_ERRORS
from twinkle.server.backends.protocol import ModelConfig
from twinkle_megatron import bridge

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe")

# Of these, by the text model's type.
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_WITH_QK_NORM = ("qwen3", "qwen3_moe", *_HYBRIDS)
_MIXTURES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model that can be built.

    Attributes:
        hf: the text model's own configuration.
        name: of the text model's class in Transformers.
        config: Megatron-Core's.
        vocab_size: token ids are below it.
        padded_vocab_size: rows of the embedding, a multiple of the ranks that share it.
        has_qkv_bias, has_qk_norm: parts of the attention that not all families have.
        linear_layers: layers with a gated delta net instead of attention, counted from 0.
        has_zero_centered_norms: norms multiply by 1 + weight.
        is_tied: whether the output head is the embedding.
        expert_layers: layers whose feed-forward part is a mixture of experts, counted from 0.
        is_bridged: whether Megatron-Bridge reads its weights, as there is no map of them here.
    """

    hf: PretrainedConfig
    name: str
    config: TransformerConfig
    vocab_size: int
    padded_vocab_size: int
    has_qkv_bias: bool
    has_qk_norm: bool
    linear_layers: frozenset[int]
    has_zero_centered_norms: bool
    is_tied: bool
    expert_layers: frozenset[int]
    is_bridged: bool


def read_hf_config(config: ModelConfig) -> PretrainedConfig:
    """
    Raises:
        InvalidRequest: if the directory holds no complete model.
    """
    if config.torch_dtype not in DTYPES:
        raise InvalidRequest(f"model.torch_dtype: {config.torch_dtype!r} is not one of {', '.join(DTYPES)}")
    files = base_folder.check(config.path)
    try:
        hf = cast("Any", AutoConfig).from_pretrained(str(config.path), local_files_only=True)
    except LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InvalidRequest(f"model: {config.path}/config.json can't be read ({reason})") from error
    if isinstance(layers := getattr(hf.get_text_config(), "num_hidden_layers", None), int):
        base_folder.check_layers(config.path, files, "model.layers", layers)
    return hf


def describe(whole: PretrainedConfig, config: ModelConfig) -> Architecture:
    """
    Args:
        whole: as in config.json: the text model's, or one that holds it beside those of other parts.

    Raises:
        InvalidRequest: if the model has a part that can't be built here, or can't be spread over the ranks.
    """
    hf = whole.get_text_config()
    is_bridged = _family(whole) not in FAMILIES
    if is_bridged:
        has_qkv_bias, has_qk_norm = _bridged_parts(whole)
    else:
        has_qkv_bias, has_qk_norm = hf.model_type == "qwen2", hf.model_type in _WITH_QK_NORM
    _check_parts(hf)
    _check_sizes(hf, config)
    tensor = config.tensor_parallel_size
    causal = cast("type | None", MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf), None))
    return Architecture(
        hf=hf,
        name=causal.__name__ if causal is not None else hf.model_type,
        config=_transformer_config(hf, config, has_qkv_bias, has_qk_norm),
        vocab_size=hf.vocab_size,
        padded_vocab_size=-(-hf.vocab_size // tensor) * tensor,
        has_qkv_bias=has_qkv_bias,
        has_qk_norm=has_qk_norm,
        linear_layers=frozenset(_linear_layers(hf)),
        has_zero_centered_norms=is_hybrid(hf),
        # Some files say it beside the text model, some in it.
        is_tied=bool(hf.tie_word_embeddings or whole.tie_word_embeddings),
        expert_layers=frozenset(_expert_layers(hf)),
        is_bridged=is_bridged,
    )


def head_size(hf: PretrainedConfig) -> int:
    """Size of one attention head."""
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


def is_mixture(hf: PretrainedConfig) -> bool:
    return hf.model_type in _MIXTURES


def is_hybrid(hf: PretrainedConfig) -> bool:
    """Whether this is of Qwen3.5's kind: gated delta nets, attention with an output gate, zero-centered norms."""
    return hf.model_type in _HYBRIDS


def shared_expert_size(hf: PretrainedConfig) -> int:
    """Inner size of the expert that all tokens go to; 0 if there is none."""
    return int(getattr(hf, "shared_expert_intermediate_size", None) or 0) if is_mixture(hf) else 0


def _family(whole: PretrainedConfig) -> str:
    return whole.model_type.removesuffix("_text")


def _expert_layers(hf: PretrainedConfig) -> list[int]:
    """As in `Qwen3MoeDecoderLayer`; Qwen3.5's mixture has experts in all layers."""
    if not is_mixture(hf) or not hf.num_experts:
        return []
    dense, step = getattr(hf, "mlp_only_layers", None) or (), getattr(hf, "decoder_sparse_step", 1)
    return [i for i in range(hf.num_hidden_layers) if i not in dense and (i + 1) % step == 0]


def _linear_layers(hf: PretrainedConfig) -> list[int]:
    return [i for i, kind in enumerate(hf.layer_types) if kind == "linear_attention"] if is_hybrid(hf) else []


def _transformer_config(
    hf: PretrainedConfig, config: ModelConfig, has_qkv_bias: bool, has_qk_norm: bool
) -> TransformerConfig:
    dtype = DTYPES[config.torch_dtype]
    on_cpu = config.device == "cpu"
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=getattr(hf, "intermediate_size", None),
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_size(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=has_qkv_bias,
        qk_layernorm=has_qk_norm,
        attention_output_gate=is_hybrid(hf),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=config.tensor_parallel_size,
        pipeline_model_parallel_size=config.pipeline_parallel_size,
        sequence_parallel=uses_sequence_parallelism(hf, config),
        # Micro-batches differ in rows and length, for which Megatron-Core requires this dispatcher; it is never built.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The losses are sums, so they are not divided by the number of micro-batches.
        calculate_per_token_loss=True,
        # The weights are read from files, straight into their places.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        # Fused kernels and batched messages need CUDA.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=not on_cpu,
        batch_p2p_sync=False,
    )


def uses_sequence_parallelism(hf: PretrainedConfig, config: ModelConfig) -> bool:
    """As configured; by default only if needed: each of the experts' ranks takes its own part of the tokens."""
    if config.tensor_parallel_size == 1:
        return False
    return is_mixture(hf) if config.sequence_parallel is None else config.sequence_parallel


# ---------------------------------------------------------------- refusals


def _bridged_parts(hf: PretrainedConfig) -> tuple[bool, bool]:
    if not bridge.is_installed():
        raise InvalidRequest(
            f"model: the Megatron backend has no weight map for {hf.model_type!r} (it has {', '.join(FAMILIES)}); "
            f"install megatron-bridge {'.'.join(map(str, bridge.OLDEST))} or newer on Python 3.12 (the extra "
            "twinkle-megatron[bridge]) for other families, or set use_megatron: false"
        )
    return bridge.attention_parts(hf)


def _check_parts(hf: PretrainedConfig) -> None:
    wants: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu",),
        "mlp_bias": (None, False),
        "use_sliding_window": (None, False),
        "attention_bias": (None, False),
    }
    for name, known in wants.items():
        value = getattr(hf, name, None)
        if value not in known:
            raise InvalidRequest(
                f"model: {name} = {value!r} is not known to the Megatron backend; set use_megatron: false"
            )


def _check_sizes(hf: PretrainedConfig, config: ModelConfig) -> None:
    tensor, expert = config.tensor_parallel_size, config.expert_parallel_size
    _check_divides("pipeline_parallel_size", config.pipeline_parallel_size, "layers", hf.num_hidden_layers)
    _check_divides("tensor_parallel_size", tensor, "key-value heads", hf.num_key_value_heads)
    _check_divides("tensor_parallel_size", tensor, "attention heads", hf.num_attention_heads)
    if is_hybrid(hf):
        _check_hybrid(hf, tensor)
    if len(_expert_layers(hf)) < hf.num_hidden_layers:
        _check_divides(
            "tensor_parallel_size", tensor, "columns of the feed-forward part", hf.intermediate_size
        )
    if not is_mixture(hf):
        if expert > 1:
            raise InvalidRequest(
                f"model.expert_parallel_size: {hf.model_type} has no routed experts to share out; leave it out"
            )
        return
    _check_divides("expert_parallel_size", expert, "experts", hf.num_experts)
    _check_divides("tensor_parallel_size", tensor, "columns of the shared expert", shared_expert_size(hf))
    if tensor > 1 and config.sequence_parallel is False:
        raise InvalidRequest(
            "model.sequence_parallel: a mixture of experts with tensor_parallel_size above 1 needs it, so that its "
            "ranks each route their own tokens; leave it out, or set it to true"
        )


def _check_hybrid(hf: PretrainedConfig, tensor: int) -> None:
    keys, values = hf.linear_num_key_heads, hf.linear_num_value_heads
    if values % keys:
        raise InvalidRequest(
            f"model: {keys} key heads of linear attention (linear_num_key_heads) don't share out {values} value heads "
            "(linear_num_value_heads); config.json is not the model's own: download it again"
        )
    _check_divides("tensor_parallel_size", tensor, "key heads of linear attention", keys)
    kinds = set(hf.layer_types) - {"linear_attention", "full_attention"}
    if kinds or len(hf.layer_types) != hf.num_hidden_layers:
        found = ", ".join(sorted(set(hf.layer_types)))
        raise InvalidRequest(
            f"model: layer_types has {len(hf.layer_types)} layers of kinds {found}, but the Megatron backend expects "
            f"{hf.num_hidden_layers} of linear_attention and full_attention; set use_megatron: false"
        )


def _check_divides(name: str, ranks: int, what: str, count: int) -> None:
    if count % ranks:
        raise InvalidRequest(
            f"model.{name}: {ranks} ranks can't share out {count} {what}; use a divisor of it"
        )
