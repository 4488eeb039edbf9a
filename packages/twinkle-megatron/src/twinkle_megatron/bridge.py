"""Families without a weight map here, through Megatron-Bridge: what it says about a model, and whether the layers here
compute that model.

Megatron-Bridge knows how each family is built from Megatron-Core's parts. The layers here are those of Llama, with or
without norms and biases in the attention: a family with anything else (windows, soft caps, scaled embeddings, linear
attention, experts) is refused. `bridge_weights` reads the weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import re
from collections.abc import Generator
from dataclasses import fields
from importlib import metadata
from typing import Any

from torch.nn import functional
from transformers import PretrainedConfig

from twinkle.protocol.errors import InvalidRequest
from twinkle_megatron import te_stub

# Older ones lose weights between ranks without a GPU: they scatter non-contiguous tensors.
OLDEST = (0, 6)

# What the layers here compute; for anything not listed, only the provider's default is allowed.
_COMPUTED: dict[str, object] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
# What is read from the model's own configuration here, by its name in it.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
# Settings that make no difference to a frozen model, are set here anyway, or are optional in the layers here.
_FREE = {
    "add_qkv_bias",
    "apply_rope_fusion",
    "attention_backend",
    "attention_dropout",
    "autocast_dtype",
    "bf16",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cp_comm_type",
    "cross_entropy_loss_fusion",
    "fp16",
    "gradient_accumulation_fusion",
    "hf_model_id",
    "hidden_dropout",
    "init_method_std",
    "make_vocab_size_divisible_by",
    "masked_softmax_fusion",
    "params_dtype",
    "persist_layer_norm",
    "qk_layernorm",
    "rope_scaling",  # angles are computed as in Transformers, see `build`
    "rope_scaling_factor",
    "rotary_base",
    "seq_length",
}


def is_installed() -> bool:
    try:
        version = metadata.version("megatron-bridge")
    except metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST


def attention_parts(hf: PretrainedConfig) -> tuple[bool, bool]:
    """Whether q, k and v have biases, and whether q and k have norms.

    Raises:
        InvalidRequest: if the model has a part that is not computed here, or Megatron-Bridge doesn't know it.
    """
    try:
        provider = auto_bridge().from_hf_config(hf).to_megatron_provider(load_weights=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Its error for an unknown family has many lines, of which the first is enough.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise refusal(hf, f"it says {reason!r}") from error
    if parts := _unknown_parts(provider, hf):
        raise refusal(hf, f"the layers here don't compute {', '.join(parts)}")
    return bool(provider.add_qkv_bias), bool(provider.qk_layernorm)


def refusal(hf: PretrainedConfig, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"model: the Megatron backend has no weight map for {hf.model_type!r}, and can't hold it by megatron-bridge's: "
        f"{why}; set use_megatron: false"
    )


def _unknown_parts(provider: Any, hf: PretrainedConfig) -> list[str]:
    common = _import("megatron.bridge.models.gpt_provider").GPTModelProvider
    if not isinstance(provider, common):
        return [type(provider).__name__]
    known = {
        **vars(common()),
        **_COMPUTED,
        **{ours: getattr(hf, name, None) for ours, name in _SIZES.items()},
    }
    if provider.kv_channels is not None:
        known["kv_channels"] = (
            getattr(hf, "head_dim", None) or provider.hidden_size // provider.num_attention_heads
        )
    found: list[str] = []
    for field in fields(provider):
        value = getattr(provider, field.name)
        if field.name not in _FREE and value != known.get(field.name):
            found.append(f"{field.name} = {getattr(value, '__name__', repr(value))}")
    if type(provider).provide is not common.provide:  # as in families that scale their embeddings
        found.append(f"what {type(provider).__name__} adds")
    return found


# ---------------------------------------------------------------- import


def auto_bridge() -> Any:
    """The class `megatron.bridge.AutoBridge`.

    Raises:
        InvalidRequest: if Megatron-Bridge can't be imported, though it is installed.
    """
    return _import("megatron.bridge").AutoBridge


@functools.cache
def _import(name: str) -> Any:
    """Takes seconds the first time, so only models that need it import it."""
    try:
        with te_stub.standing_in(), _quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise InvalidRequest(
            f"model: megatron-bridge is installed, but can't be imported ({error}); "
            "it may want other versions of its dependencies, Transformers above all"
        ) from error


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """When imported it reports everything it didn't find, and takes over the process's logging."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
