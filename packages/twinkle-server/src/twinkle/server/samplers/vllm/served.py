"""What a model's configuration says about it: no weights are read, and nothing of vLLM is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from twinkle.protocol.errors import InvalidRequest, words_of
from twinkle.server.backends.hf.base_model import DTYPES, LOADING_ERRORS, find_targets
from twinkle.server.backends.hf.export_facts import export_facts
from twinkle.server.backends.hf.model_facts import context_length, eos_token_ids
from twinkle.server.backends.protocol import ExportFacts, ModelConfig


@dataclass(frozen=True)
class ServedModel:
    """
    Attributes:
        vocab_size: token ids are below it.
        max_context_length: longest sequence, in tokens.
        eos_token_ids: end a sample without stops of its own.
        layers: the linear layers that adapters act on, by full name: (numbers in, numbers out).
        rank_bytes: of an adapter on all of them, for each rank.
        export: names of its parts in the class that its config.json names, which vLLM goes by.
    """

    vocab_size: int
    max_context_length: int
    eos_token_ids: tuple[int, ...]
    layers: Mapping[str, tuple[int, int]]
    rank_bytes: int
    export: ExportFacts

    @property
    def layer_kinds(self) -> list[str]:
        """Last parts of the layers' names, such as `q_proj`."""
        return sorted({name.rpartition(".")[2] for name in self.layers})


def served_model(config: ModelConfig) -> ServedModel:
    """
    Raises:
        InvalidRequest: if the directory holds no model of a kind that Transformers knows, or `config` can't be used.
    """
    if config.torch_dtype not in DTYPES:
        raise InvalidRequest(f"model.torch_dtype: {config.torch_dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        settings = cast("Any", AutoConfig).from_pretrained(str(config.path), local_files_only=True)
        with torch.device("meta"):
            model = cast("PreTrainedModel", cast("Any", AutoModelForCausalLM).from_config(settings))
        names, _ = find_targets(model)
    except LOADING_ERRORS as error:
        raise InvalidRequest(
            f"model: {config.path} can't be read as a causal language model ({words_of(error)}); give a directory with "
            "config.json and safetensors of an architecture that Transformers knows"
        ) from error
    found = {name: cast("Any", layer) for name in names if (layer := _linear(model, name)) is not None}
    layers = {name: (int(layer.in_features), int(layer.out_features)) for name, layer in found.items()}
    head = cast("Any", model.get_output_embeddings())
    tied = bool(getattr(settings.get_text_config(), "tie_word_embeddings", False))
    return ServedModel(
        vocab_size=int(head.weight.shape[0]),
        max_context_length=context_length(settings.get_text_config(), config),
        eos_token_ids=eos_token_ids(_generation(config), settings.get_text_config()),
        layers=layers,
        rank_bytes=sum(map(sum, layers.values())) * DTYPES[config.torch_dtype].itemsize,
        export=export_facts(config.path, tied_head=tied),
    )


def _linear(model: nn.Module, name: str) -> nn.Linear | None:
    """The linear layer of this name; None if it is a parameter's."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) else None


def _generation(config: ModelConfig) -> GenerationConfig | None:
    if not (config.path / "generation_config.json").is_file():
        return None
    return cast("Any", GenerationConfig).from_pretrained(str(config.path), local_files_only=True)
