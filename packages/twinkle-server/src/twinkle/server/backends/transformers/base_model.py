"""The frozen base model: loaded from a directory, checked, and described. Knows nothing of LoRA.

Trainer and sampler in one process share one copy of the weights: both take their module tree from
`copy_sharing_weights(loaded.model)`, and `loaded.model` itself stays as it was loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.module_groups import ModuleGroup, module_group
from twinkle.server.backends.protocol import BaseModelInfo, ModelConfig
from twinkle.server.backends.transformers.model_facts import context_length, eos_token_ids, max_batch_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A frozen base model in evaluation mode.

    Attributes:
        model: the causal language model; none of its parameters requires a gradient.
        targets: the linear layers that can get a low-rank term, by full name, in the order of the module tree.
        info: what requests are checked against.
    """

    model: PreTrainedModel
    targets: dict[str, ModuleGroup]
    info: BaseModelInfo

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_base_model(config: ModelConfig) -> LoadedModel:
    """Load a model from a directory with `config.json` and safetensors.

    Raises:
        InvalidRequest: if the directory holds no such model, or it can't be held as the configuration says.
    """
    _check(config)
    model = _load(config)
    model.requires_grad_(False)
    model.eval()
    targets = linear_layers(model)
    if not {"attn", "mlp"} & set(targets.values()):
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} has no linear layers (torch.nn.Linear) under attention "
            "or feed-forward modules that LoRA could act on; use a decoder such as Llama, Qwen2 or Qwen3"
        )
    _check_head(model, config)
    return LoadedModel(model, targets, _describe(model, config))


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A module tree of its own over the same parameters and buffers: layers can be replaced in it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=cast("dict[int, Any]", shared))


def linear_layers(model: PreTrainedModel) -> dict[str, ModuleGroup]:
    """The linear layers of the text decoder and the output head, with their groups."""
    prefix = _decoder_name(model) + "."
    head = model.get_output_embeddings()
    found: dict[str, ModuleGroup] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        group = "unembed" if module is head else module_group(name)
        if group == "unembed" or (group is not None and name.startswith(prefix)):
            found[name] = group
    return found


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its output head: token ids to hidden states."""
    return cast("nn.Module", cast("Any", model).get_decoder())


def finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What a model does to its head's output: Cohere's and Granite's scale, Gemma's soft cap.

    Args:
        logits: [..., vocabulary], any float type.
    """
    text = config.get_text_config()
    if scale := getattr(text, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(text, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(text, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


# ---------------------------------------------------------------- loading


def _check(config: ModelConfig) -> None:
    if config.torch_dtype not in DTYPES:
        raise InvalidRequest(f"model.torch_dtype: {config.torch_dtype!r} is not one of {', '.join(DTYPES)}")
    if config.tensor_parallel_size != 1 or config.pipeline_parallel_size != 1:
        raise InvalidRequest(
            "model: the Transformers backend holds the whole model on one device: leave out tensor_parallel_size and "
            "pipeline_parallel_size (or set them to 1)"
        )
    if not (config.path / "config.json").is_file():
        raise InvalidRequest(
            f"model: {config.path} is not a model directory: it has no config.json; "
            "give a directory with config.json and safetensors"
        )
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest(
            f"model: device {config.device!r} was asked for, but torch sees no GPU; use 'cpu'"
        )


def _load(config: ModelConfig) -> PreTrainedModel:
    where: dict[str, object] = {} if config.device == "cpu" else {"device_map": {"": config.device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(config.path),
            dtype=DTYPES[config.torch_dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **where,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest(
            f"model: {config.path} can't be loaded as a causal language model ({error}); "
            "give a directory with config.json and safetensors of an architecture that Transformers knows"
        ) from error
    return cast("PreTrainedModel", model)


def _decoder_name(model: PreTrainedModel) -> str:
    wanted = decoder(model)
    return next(name for name, module in model.named_modules() if module is wanted)


@torch.no_grad()
def _check_head(model: PreTrainedModel, config: ModelConfig) -> None:
    """Log-probabilities are taken from hidden states and head in chunks: make sure that this is what the model does."""
    tokens = torch.arange(4, device=model.device).unsqueeze(0)
    head = cast("nn.Module", model.get_output_embeddings())
    hidden = cast("Tensor", decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state)
    ours = finish_logits(head(hidden), model.config)
    theirs = cast("Tensor", model(input_ids=tokens, use_cache=False).logits)
    if not torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.05):
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} computes its logits in a way that is not known here "
            "(neither soft cap nor scale); use another model"
        )


# ---------------------------------------------------------------- describing


def _describe(model: PreTrainedModel, config: ModelConfig) -> BaseModelInfo:
    text = model.config.get_text_config()
    vocab_size = min(
        cast("Tensor", layer.weight).shape[0]
        for layer in (model.get_input_embeddings(), cast("nn.Module", model.get_output_embeddings()))
    )
    return BaseModelInfo(
        vocab_size=vocab_size,
        max_context_length=context_length(text, config),
        max_lora_rank=config.max_lora_rank,
        max_batch_tokens=max_batch_tokens(text, model.dtype, model.device),
        eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), text),
        architecture=type(model).__name__,
    )
