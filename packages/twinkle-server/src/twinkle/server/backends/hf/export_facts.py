"""Other programs' names for a base model's parts, found by asking Transformers' classes.

A checkpoint's config.json may name another class than `AutoModelForCausalLM` makes of it: Qwen3.5 is published as
`Qwen3_5ForConditionalGeneration`, whose decoder is `model.language_model`, and is loaded here as `Qwen3_5ForCausalLM`,
where it is `model`. vLLM, SGLang and PEFT follow config.json. Used by both backends.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from twinkle.server.backends.protocol import ExportFacts

log = logging.getLogger(__name__)

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def export_facts(path: Path, tied_head: bool) -> ExportFacts:
    """
    Args:
        path: a directory with config.json; no weights are read.
        tied_head: whether the output head is the embedding's matrix.
    """
    config = cast(
        "PretrainedConfig", cast("Any", AutoConfig).from_pretrained(str(path), local_files_only=True)
    )
    mixture = any(has_routed_experts(one) for one in (config, config.get_text_config()))
    try:
        serving_class, renamed = _serving_names(config)
    # Transformers' classes may raise anything: the model itself is served anyway.
    except Exception as error:
        log.warning(
            "%s: adapters can't be exported under the names of %s (%s)", path, config.architectures, error
        )
        serving_class, renamed = None, ()
    return ExportFacts(mixture, tied_head, serving_class, renamed)


def has_routed_experts(config: PretrainedConfig) -> bool:
    """Whether a model of this kind may have routed experts: PEFT goes by the kind, not by the layers."""
    conversions = cast("list[Any]", get_checkpoint_conversion_mapping(config.model_type) or [])
    targets = [pattern for one in conversions for pattern in cast("list[str]", one.target_patterns)]
    return any(".experts." in target for target in targets) or any(
        getattr(config, count, None) for count in _EXPERT_COUNTS
    )


def _serving_names(config: PretrainedConfig) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The class that `config` names, and the parts of the text model with another name in it.

    Raises:
        ValueError: if that class has no such text model, or has several.
    """
    name = (config.architectures or [""])[0]
    theirs = getattr(transformers, name, None)
    if theirs is None:
        return None, ()
    if theirs is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None):
        return name, ()
    with torch.device("meta"):
        ours = cast("PreTrainedModel", cast("Any", AutoModelForCausalLM).from_config(config))
        other = cast("PreTrainedModel", theirs._from_config(config))
    decoders = name_of(ours, ours.base_model), _decoder_in(other, type(ours.base_model))
    heads = name_of(ours, ours.get_output_embeddings()), name_of(other, other.get_output_embeddings())
    pairs = (decoders, heads)
    for mine, other_name in pairs:
        _check_alike(ours.get_submodule(mine), other.get_submodule(other_name), name)
    return name, tuple(pair for pair in pairs if pair[0] != pair[1])


def name_of(model: PreTrainedModel, module: object) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _decoder_in(model: PreTrainedModel, kind: type[nn.Module]) -> str:
    found = [name for name, module in model.named_modules() if type(module) is kind]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} modules of {kind.__name__}")
    return found[0]


def _check_alike(mine: nn.Module, other: nn.Module, name: str) -> None:
    shapes = [{n: tuple(p.shape) for n, p in module.named_parameters()} for module in (mine, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} has other parameters than {type(mine).__name__}")
