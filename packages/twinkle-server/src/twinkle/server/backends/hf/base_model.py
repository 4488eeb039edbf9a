"""The frozen base model: loaded from a directory, checked, and described. Knows nothing of LoRA.

Trainer and sampler in one process share one copy of the weights: both take their module tree from
`copy_sharing_weights(loaded.model)`, and `loaded.model` itself stays as it was loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf import base_folder
from twinkle.server.backends.hf.device_memory import MemoryAccount
from twinkle.server.backends.hf.export_facts import export_facts, name_of
from twinkle.server.backends.hf.fused_layers import fuse_layers
from twinkle.server.backends.hf.kernels import choose_kernels
from twinkle.server.backends.hf.model_facts import (
    context_length,
    eos_token_ids,
    max_batch_tokens,
    overhead_tokens,
)
from twinkle.server.backends.hf.shards import Shards
from twinkle.server.backends.hf.threads import matrix_weights
from twinkle.server.backends.lora.module_groups import (
    EXPERT_PARAMETERS,
    groups_there_are,
    is_expert_parameter,
    module_group,
)
from twinkle.server.backends.protocol import BaseModelInfo, ModelConfig, ModuleGroup

# Not float16: in a backward pass through a frozen model, gradients below 6e-8 would be lost, and losses aren't scaled.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What Transformers raises if a directory is not what it should be.
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
# GPT-OSS is published like this; Transformers dequantises it on request.
_DEQUANTISED = {"mxfp4": partial(Mxfp4Config, dequantize=True)}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A frozen base model in evaluation mode.

    Attributes:
        model: the causal language model; none of its parameters requires a gradient.
        targets: what can get a low-rank term, by full name, in the order of the module tree: linear layers, and the
            parameters of `experts`.
        info: what requests are checked against.
        experts: the modules of routed experts among the targets, by full name.
        memory: how what the weights have left is divided.
        shards: this rank's parts, if the model is spread over ranks: its own parameters are then placeholders.
    """

    model: PreTrainedModel
    targets: dict[str, ModuleGroup]
    info: BaseModelInfo
    memory: MemoryAccount
    experts: tuple[str, ...] = ()
    shards: Shards | None = None

    @property
    def linears(self) -> list[str]:
        """The linear layers among the targets."""
        return [name for name in self.targets if name.rpartition(".")[0] not in self.experts]

    @property
    def device(self) -> torch.device:
        return self.model.device if self.shards is None else self.shards.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_base_model(config: ModelConfig) -> LoadedModel:
    """Load a model from a directory with `config.json` and safetensors; with `config.shard_base`, this rank's parts.

    Raises:
        InvalidRequest: if the directory has no such model, or it can't be loaded as configured.
    """
    _check(config)
    shards = None
    if config.shard_base:
        shards = Shards(config.rank, config.data_parallel_size, torch.device(config.device))
    return freeze(_load(config, shards), config, shards)


def freeze(model: PreTrainedModel, config: ModelConfig, shards: Shards | None = None) -> LoadedModel:
    """Make a base model of one that is in memory, loaded or made there: frozen, checked and described.

    Args:
        config: `path` must have the model's `config.json`.
        memory: how what the weights have left is divided.
        shards: this rank's parts, if the model is spread over ranks.

    Raises:
        InvalidRequest: if adapters can't be trained on it.
    """
    model.requires_grad_(False)
    model.eval()
    device = model.device if shards is None else shards.device
    notes = choose_kernels(model, device)
    if shards is None:
        notes += fuse_layers(model, device)
    _check_finite(model, shards, config)
    targets, experts = find_targets(model)
    if not {"attn", "mlp"} & set(targets.values()):
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} has no linear layers (torch.nn.Linear) under attention "
            "or feed-forward modules that LoRA could act on; use a decoder such as Llama, Qwen2 or Qwen3"
        )
    if shards is None:  # else it can only be run by all ranks together, which check it then
        check_runs(model, config)
    memory = MemoryAccount.of(config, device)
    info = replace(_describe(model, targets, config, device, memory), notes=notes)
    return LoadedModel(model, targets, info, memory, experts, shards)


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A separate module tree over the same weights, in which layers can be replaced.

    Buffers that are not in checkpoints are copied: Transformers writes a rope's frequencies into one of them in each
    call, and the copies compute at the same time.
    """
    weights = model.state_dict(keep_vars=True).values()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *weights)}
    return copy.deepcopy(model, memo=cast("dict[int, Any]", shared))


def find_targets(model: PreTrainedModel) -> tuple[dict[str, ModuleGroup], tuple[str, ...]]:
    """The linear layers and routed experts' parameters of the text decoder, and the output head, with their groups.

    Returns:
        Them, and the names of the experts modules, both in the order of the module tree.
    """
    prefix = name_of(model, decoder(model)) + "."
    head = model.get_output_embeddings()
    found: dict[str, ModuleGroup] = {}
    experts: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_plain(module):
            group = "unembed" if module is head else module_group(name)
            if group == "unembed" or (group is not None and name.startswith(prefix)):
                found[name] = group
        elif name.startswith(prefix) and _is_plain_experts(module):
            parameters = [f"{name}.{parameter}" for parameter in EXPERT_PARAMETERS]
            if all(is_expert_parameter(parameter) for parameter in parameters):
                experts.append(name)
                found |= dict.fromkeys(parameters, "mlp")
    return found, tuple(experts)


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Whether this is a plain matrix product. Some subclasses of linear layers do otherwise, e.g. in groups."""
    if type(layer).forward is nn.Linear.forward:
        return True
    if layer.weight.is_meta:  # of a model that is spread over ranks: any weights will do
        layer = copy.deepcopy(layer).to_empty(device="cpu")
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    x = x.view(1, 2, -1)
    try:
        found = cast("object", layer(x))
    except LOADING_ERRORS:
        return False
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    # Routers of Phi-3.5-MoE and Llama 4 return two tensors.
    return isinstance(found, Tensor) and found.shape == expected.shape and agree(found, expected)


def _is_plain_experts(module: nn.Module) -> bool:
    """Whether this holds routed experts that compute `down(act(gate) * up)`, like Qwen's, Mixtral's and many others.

    Transformers marks each class with what it does besides (`integrations.moe.use_experts_implementation`). PEFT's
    names depend on the order of the parameters.
    """
    if [name for name, _ in module.named_parameters(recurse=False)] != list(EXPERT_PARAMETERS):
        return False
    if not all(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
        return False
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    # Transformers 5.0 knows no others of these two kinds, and so doesn't say.
    unsaid = {"has_gate": True, "is_concatenated": True}
    gating = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, flag, unsaid.get(flag)) is value for flag, value in wanted.items())
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(gating, "__module__", None) == "transformers.integrations.moe"
        and callable(getattr(module, "act_fn", None))
    )


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its output head: token ids to hidden states."""
    found = cast("nn.Module", cast("Any", model).get_decoder())
    # Llama 4's class names its decoder by another attribute than it has, and so gives itself.
    return cast("nn.Module", model.model) if found is model else found


def finish_logits(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """What a model does to its head's output: Cohere's and Granite's scaling, Gemma's soft cap.

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
            "model: the Transformers backend computes whole layers on each rank: leave out tensor_parallel_size and "
            "pipeline_parallel_size (or set them to 1)"
        )
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest(
            f"model: device {config.device!r} was asked for, but torch sees no GPU; use 'cpu'"
        )


def _load(config: ModelConfig, shards: Shards | None) -> PreTrainedModel:
    method = base_folder.quantised_by(config.path)
    base_folder.check(config.path, can_dequantise=_DEQUANTISED)
    on_host = config.device == "cpu" or shards is not None
    settings: dict[str, object] = {} if on_host else {"device_map": {"": config.device}}
    if method in _DEQUANTISED:
        settings["quantization_config"] = _DEQUANTISED[method]()
    try:
        with nullcontext() if shards is None else shards.cutting(_vocab_size(config)):
            model, report = cast("Any", AutoModelForCausalLM).from_pretrained(
                str(config.path),
                dtype=DTYPES[config.torch_dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused
                **settings,
            )
        if shards is not None:
            shards.cut_rest(model)
    except torch.OutOfMemoryError as error:
        raise InvalidRequest(
            f"model: {config.path} does not fit into the memory of {config.device} in {config.torch_dtype}; use a "
            "smaller model, or bfloat16 if it isn't in that already"
        ) from error
    except LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InvalidRequest(
            f"model: {config.path} can't be loaded as a causal language model ({reason[:400]}); "
            "give a directory with config.json and safetensors of an architecture that Transformers knows"
        ) from error
    _check_report(model, report, config)
    return cast("PreTrainedModel", model)


def _vocab_size(config: ModelConfig) -> int:
    """As config.json has it."""
    found = AutoConfig.from_pretrained(str(config.path), local_files_only=True, trust_remote_code=False)
    return int(found.get_text_config().vocab_size)


def _check_report(model: PreTrainedModel, report: Mapping[str, Any], config: ModelConfig) -> None:
    """
    Args:
        report: Transformers' report on loading; leaves out what the class can do without, or ties.

    Raises:
        InvalidRequest: if the model is not what is in the files.
    """
    mismatched = cast("set[tuple[str, Sequence[int], Sequence[int]]]", report.get("mismatched_keys") or set())
    for name, found, wanted in sorted(mismatched):
        raise InvalidRequest(
            f"model: {name} in {config.path} has shape {list(found)}, but by config.json it must be {list(wanted)}; "
            "the weights and config.json don't belong together: download the model again, all of its files"
        )
    if missing := report.get("missing_keys"):
        raise base_folder.missing(config.path, missing, type(model).__name__)
    text = model.config.get_text_config()
    count = int(text.num_hidden_layers)
    # Some predict further tokens with additional layers at the end, which are not computed here.
    ahead = int(getattr(text, "num_nextn_predict_layers", None) or 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            base_folder.check_layers(config.path, report.get("unexpected_keys") or (), name, count + ahead)


@torch.no_grad()
def _check_finite(model: PreTrainedModel, shards: Shards | None, config: ModelConfig) -> None:
    """Check each weight that this rank has, with one transfer for all of them."""
    parts = (
        (name, weight if shards is None else shards.parts[weight])
        for name, weight in model.named_parameters()
    )
    named = [(name, weight) for name, weight in parts if weight.numel()]
    ends = [torch.stack(torch.aminmax(weight)).isfinite().all() for _, weight in named]
    for (name, _), is_finite in zip(named, cast("list[bool]", torch.stack(ends).tolist()), strict=True):
        if not is_finite:
            raise base_folder.not_finite(config.path, name)


@torch.no_grad()
def check_runs(model: PreTrainedModel, config: ModelConfig) -> None:
    """Log-probabilities are computed from hidden states and head in chunks, and rows are padded at the right without a
    mask: check that this gives what the model does.

    Raises:
        InvalidRequest: if it doesn't, or the model can't be run.
    """
    tokens = torch.arange(4, device=config.device).unsqueeze(0)
    head = cast("nn.Module", model.get_output_embeddings())
    try:
        hidden = cast("Tensor", decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state)
        shorter = cast("Tensor", decoder(model)(input_ids=tokens[:, :3], use_cache=False).last_hidden_state)
        ours = finish_logits(head(hidden), model.config)
        theirs = cast("Tensor", model(input_ids=tokens, use_cache=False).logits)
    except LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} can be loaded, but not run ({reason[:400]}); is its "
            "config.json the one that belongs to its weights? Else use another model"
        ) from error
    if not torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.05):
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} computes its logits in a way that is not known here "
            "(neither soft cap nor scale); use another model"
        )
    if not agree(shorter, hidden[:, :3]):
        raise InvalidRequest(
            f"model: {type(model).__name__} in {config.path} is not causal: what a token stands for depends on those "
            "behind it. Use a decoder (for some families: is_decoder in config.json)"
        )


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two ways to compute the same agree within their dtype's precision: in 16 bits, with experts that change
    by rounding, only roughly.
    """
    most = 3e-3 if other.dtype == torch.float32 else 0.5
    return bool((one - other).float().norm() <= most * other.float().norm())


# ---------------------------------------------------------------- describing


def _describe(
    model: PreTrainedModel,
    targets: Mapping[str, ModuleGroup],
    config: ModelConfig,
    device: torch.device,
    memory: MemoryAccount,
) -> BaseModelInfo:
    text = model.config.get_text_config()
    ends = [model.get_input_embeddings(), cast("nn.Module", model.get_output_embeddings())]
    embedding, head = (cast("Tensor", layer.weight) for layer in ends)
    return BaseModelInfo(
        vocab_size=min(embedding.shape[0], head.shape[0]),
        max_context_length=context_length(text, config),
        max_lora_rank=config.max_lora_rank,
        max_batch_tokens=max_batch_tokens(text, model.dtype, device, memory.passes),
        eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), text),
        architecture=type(model).__name__,
        overhead_tokens=overhead_tokens(int(text.num_hidden_layers), matrix_weights(model), device),
        export=export_facts(config.path, tied_head=embedding is head),
        trainable=groups_there_are(targets.values()),
    )
