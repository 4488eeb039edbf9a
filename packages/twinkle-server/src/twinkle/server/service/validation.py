"""Checks on requests before they are queued. Each message names the field, what is allowed, and what to do."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from twinkle.hub import plain_name
from twinkle.protocol import messages as m
from twinkle.protocol import uris
from twinkle.protocol.codec import tensor_of_json
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array, Datum, Int32Array, LoraConfig, SparseTensor, TensorData
from twinkle.server.backends.protocol import (
    ALL_GROUPS,
    CUSTOM_LOSS,
    TARGETS,
    BaseModelInfo,
    CustomLoss,
    LossSpec,
    LossSpecs,
)
from twinkle.server.engine.worker import WorkerPort, only_trains
from twinkle.server.store import tables
from twinkle.server.store.encryption import check_recipients

MAX_SAMPLES = 1024
# Values that a sample may request about its prompt: top-k tables, alternatives, chosen tokens.
MAX_PROMPT_CELLS = 2**22
# The same for generated tokens.
MAX_SAMPLE_CELLS = 2**25


def check_base_model(name: str, served: str, field: str = "base_model") -> None:
    """
    Args:
        name: any id of a model: `ms://org/name` is the same as `org/name`.
    """
    if plain_name(name) != plain_name(served):
        raise InvalidRequest(f"{field}: {name[:200]!r} is not served here; this server's model is {served!r}")


def check_samples(worker: WorkerPort) -> None:
    """
    Raises:
        InvalidRequest: if nothing is sampled here.
    """
    if worker.samplers == "nowhere":
        raise only_trains()


def check_lora_config(config: LoraConfig, info: BaseModelInfo) -> None:
    if not 1 <= config.rank <= info.max_lora_rank:
        raise InvalidRequest(
            f"lora_config.rank: {config.rank} is not possible; choose 1 to {info.max_lora_rank} "
            "(the server's model.max_lora_rank sets the upper end)"
        )
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise InvalidRequest(
            "lora_config: train_attn, train_mlp and train_unembed are all false, so nothing would be trained; "
            "set one of them"
        )
    flags = trainable_flags(config, info)
    if not any(flags.values()):
        raise InvalidRequest(
            f"lora_config: no layer of {info.architecture} that {' or '.join(_set_flags(config))} asks for can be "
            f"trained here; set {' or '.join(f'train_{group}' for group in info.trainable)}"
        )
    if config.alpha is not None and not 0 < config.alpha < float("inf"):
        raise InvalidRequest(f"lora_config.alpha: {config.alpha} is not possible; choose a number above 0")


def trainable_flags(config: LoraConfig, info: BaseModelInfo) -> dict[str, bool]:
    """The effective `train_attn`, `train_mlp` and `train_unembed`: False if the model has no such layers that can be
    trained. (The default asks for all.)
    """
    asked = _set_flags(config)
    return {f"train_{group}": f"train_{group}" in asked and group in info.trainable for group in ALL_GROUPS}


def _set_flags(config: LoraConfig) -> list[str]:
    flags = {
        "train_attn": config.train_attn,
        "train_mlp": config.train_mlp,
        "train_unembed": config.train_unembed,
    }
    return [name for name, is_set in flags.items() if is_set]


def check_optimizer(config: dict[str, object], field: str) -> None:
    kind = config.get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise InvalidRequest(f"{field}: optimizer {kind!r} is not available on this server; use 'adamw'")


def check_on_run(request: m.Ordered, longest_ttl: int | None, most_metadata_bytes: int | None = None) -> None:
    """Check requests on a run other than training passes.

    Args:
        longest_ttl: most seconds that a checkpoint may be kept; None: no limit.
        most_metadata_bytes: None: no limit.
    """
    if (metadata := getattr(request, "user_metadata", None)) is not None:
        check_metadata(metadata, most_metadata_bytes)
    match request:
        case m.OptimStepRequest(optimizer_params=params) if params is not None:
            check_optimizer(params, "optimizer_params.type")
        case m.SaveWeightsRequest():
            _check_new(request.path, request.ttl_seconds, longest_ttl)
        case m.SaveWeightsForSamplerRequest():
            if request.path is not None:
                _check_new(request.path, request.ttl_seconds, longest_ttl)
            elif request.sampling_session_seq_id is None:
                raise InvalidRequest("path: missing; give a name, or sampling_session_seq_id for a snapshot")
        case m.SaveWeightsExternalRequest():
            _check_new(request.path, request.ttl_seconds, longest_ttl)
            if request.age_encryption_recipients:
                check_recipients(request.age_encryption_recipients)
        case m.LoadWeightsRequest():
            uris.parse(request.path)
        case _:
            pass


def check_metadata(metadata: Mapping[str, Any] | None, most: int | None) -> None:
    """
    Args:
        most: bytes, as JSON.

    Raises:
        InvalidRequest: if it is longer.
    """
    if metadata and most is not None:
        size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode(errors="replace"))
        if size > most:
            raise InvalidRequest(
                f"user_metadata: {size} bytes as JSON; at most {most} (limits.max_metadata_bytes); keep what is large "
                "in a file of your own, and its name here"
            )


def _check_new(name: str, ttl_seconds: int | None, longest_ttl: int | None) -> None:
    """Check a new checkpoint's name and time to live."""
    uris.check_name(name, "path")
    if name.startswith(tables.UNNAMED_PREFIX) or name == tables.RELEASED_NAME:
        raise InvalidRequest(f"path: {name[:80]!r} is a name of the server's own; choose another")
    check_ttl(ttl_seconds, longest_ttl)


def check_ttl(ttl_seconds: int | None, longest: int | None) -> None:
    if ttl_seconds is not None and longest is not None and ttl_seconds > longest:
        raise InvalidRequest(
            f"ttl_seconds: {ttl_seconds} is longer than this server keeps a checkpoint; ask for at most {longest} "
            "(limits.max_checkpoint_ttl_seconds)"
        )


# ---------------------------------------------------------------- training passes


def check_pass(
    request: m.ForwardBackwardRequest,
    info: BaseModelInfo,
    loss_fns: LossSpecs,
    custom_loss: CustomLoss | None = None,
) -> int:
    """
    Args:
        custom_loss: what the request names, if its loss is "custom".

    Returns:
        The pass's cost in tokens; each operation of a custom loss counts as one.

    Raises:
        InvalidRequest: naming the first thing that is wrong.
    """
    spec = loss_fns.get(request.loss_fn)
    if spec is None:
        raise InvalidRequest(_unknown_loss(request.loss_fn, loss_fns))
    if custom_loss is None:
        _check_loss_config(request, spec)
    if not request.data:
        raise InvalidRequest("data: no datums were sent; send at least one")
    lengths = [len(datum.model_input.tokens) for datum in request.data]
    for i, datum in enumerate(request.data):
        _check_datum(datum, f"data[{i}]", info, spec)
        if custom_loss is not None:
            _check_custom_inputs(datum, f"data[{i}]", custom_loss)
    nodes = len(custom_loss.graph.nodes) if custom_loss is not None else 0
    return sum(lengths) + nodes * len(lengths)


def _unknown_loss(given: str, known: LossSpecs) -> str:
    if given == "stable_reinforce":
        return (
            "loss_fn: 'stable_reinforce' needs what a sampler records about each sequence's stability, and this "
            "server records none; use importance_sampling, ppo, cispo or gspo"
        )
    # "custom" alone is no choice: forward_backward_custom adds an id.
    return _unknown("loss_fn", given, [name for name in known if name != CUSTOM_LOSS])


def _check_loss_config(request: m.ForwardBackwardRequest, spec: LossSpec) -> None:
    for name, value in request.loss_fn_config.items():
        if name not in spec.config:
            takes = f"takes {', '.join(sorted(spec.config))}" if spec.config else "takes no parameters"
            raise InvalidRequest(
                f"loss_fn_config.{name[:80]}: {request.loss_fn} has no such parameter; it {takes}"
            )
        if isinstance(value, str) or not math.isfinite(value):
            raise InvalidRequest(f"loss_fn_config.{name}: {value!r} is not a finite number")
    config = {**spec.config, **request.loss_fn_config}
    low, high = config.get("clip_low_threshold", 0.0), config.get("clip_high_threshold", 0.0)
    if not isinstance(low, str) and not isinstance(high, str) and low > high:
        raise InvalidRequest(
            f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}; both are ratios, around 1"
        )


def _unknown(field: str, given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given[:80], list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field}: {given[:80]!r} is not known here; use one of {', '.join(sorted(known))}{hint}"


def check_tokens(tokens: Int32Array, field: str, info: BaseModelInfo) -> None:
    if len(tokens) == 0:
        raise InvalidRequest(f"{field}: no tokens; send at least one")
    if len(tokens) > info.max_context_length:
        raise InvalidRequest(
            f"{field}: {len(tokens)} tokens, but this model takes at most {info.max_context_length}; truncate "
            "(a Template does with max_length and truncation_strategy), or split"
        )
    highest = int(tokens.max())
    if highest >= info.vocab_size:
        raise InvalidRequest(
            f"{field}: token id {highest} is outside of the vocabulary (0 to {info.vocab_size - 1}); "
            "was another model's tokenizer used?"
        )


def _check_datum(datum: Datum, where: str, info: BaseModelInfo, spec: LossSpec) -> None:
    """Check the inputs that the loss reads; others are ignored."""
    tokens = datum.model_input.tokens
    check_tokens(tokens, f"{where}.model_input", info)
    inputs = {name: tensor.array for name, tensor in datum.loss_fn_inputs.items()}
    missing = [name for name in (TARGETS, *spec.inputs) if name not in inputs]
    if missing:
        raise InvalidRequest(f"{where}.loss_fn_inputs: {', '.join(missing)} missing; send one value a token")
    _check_targets(inputs[TARGETS], len(tokens), f"{where}.loss_fn_inputs.{TARGETS}", info, spec)
    for name in spec.inputs:
        field = f"{where}.loss_fn_inputs.{name}"
        if inputs[name].shape != inputs[TARGETS].shape:
            raise InvalidRequest(
                f"{field}: shape {list(inputs[name].shape)}, but {TARGETS} has {list(inputs[TARGETS].shape)}; send one "
                "value for each target"
            )
        check_finite(inputs[name], field)


def _check_targets(targets: Array, length: int, field: str, info: BaseModelInfo, spec: LossSpec) -> None:
    if not 1 <= targets.ndim <= spec.max_rank or len(targets) != length or targets.size == 0:
        wide = f" or [{length}, K]" if spec.max_rank == 2 else ""
        raise InvalidRequest(
            f"{field}: shape {list(targets.shape)}, but model_input has {length} tokens; send [{length}]{wide}"
        )
    if targets.dtype.kind != "i":
        raise InvalidRequest(f"{field}: must be integers, got {targets.dtype}")
    if targets.min() < 0 or targets.max() >= info.vocab_size:
        wrong = int(targets.min()) if targets.min() < 0 else int(targets.max())
        raise InvalidRequest(
            f"{field}: token id {wrong} is outside of the vocabulary (0 to {info.vocab_size - 1}); mask tokens with a "
            "weight of 0, not with an id"
        )


def check_finite(array: Array, field: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InvalidRequest(f"{field}: entry {first} is {array.ravel()[first]}; all must be finite numbers")


def _check_custom_inputs(datum: Datum, where: str, loss: CustomLoss) -> None:
    logprobs, *others = loss.inputs
    for wanted, name in [(logprobs, TARGETS), *((other, other.name) for other in others)]:
        field = f"{where}.loss_fn_inputs.{name}"
        if name not in datum.loss_fn_inputs:
            raise InvalidRequest(f"{field}: missing; the loss {loss.name!r} reads it")
        array = datum.loss_fn_inputs[name].array
        is_scalar = wanted.rank == 0 and array.size == 1  # on the wire a scalar looks like a vector of one
        if array.ndim != wanted.rank and not is_scalar:
            raise InvalidRequest(
                f"{field}: has {array.ndim} dimensions, but the loss {loss.name!r} was made for {wanted.rank}"
            )
        check_finite(array, field)


# ---------------------------------------------------------------- samples


def check_sample(request: m.SampleRequest, info: BaseModelInfo) -> None:
    check_tokens(request.prompt.tokens, "prompt", info)
    params, length = request.sampling_params, len(request.prompt.tokens)
    room = info.max_context_length - length
    # A prompt that is only scored may fill the context: nobody reads the one token generated with it.
    if room < (params.max_tokens or 1) and not (request.prompt_logprobs and params.max_tokens == 1):
        raise InvalidRequest(
            f"sampling_params.max_tokens: {params.max_tokens} after a prompt of {length} tokens goes "
            f"beyond this model's {info.max_context_length}; ask for at most {max(room, 0)} or shorten the prompt"
        )
    if request.num_samples > MAX_SAMPLES:
        raise InvalidRequest(
            f"num_samples: {request.num_samples} is above {MAX_SAMPLES}; send several requests"
        )
    if isinstance(params.stop, list):
        for stop in params.stop:
            if stop == "" or (isinstance(stop, int) and not 0 <= stop < info.vocab_size):
                raise InvalidRequest(
                    f"sampling_params.stop: {stop!r} can't end a text; use non-empty strings, or token ids from 0 to "
                    f"{info.vocab_size - 1}"
                )
    elif params.stop == "":
        raise InvalidRequest(
            "sampling_params.stop: an empty string can't end a text; use [] for no stop at all"
        )
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(request, name) > info.vocab_size:
            raise InvalidRequest(f"{name}: at most {info.vocab_size}, the size of the vocabulary")
    tokens = request.num_samples * (params.max_tokens or room)
    if request.topk_sample_logprobs * tokens > MAX_SAMPLE_CELLS:
        raise InvalidRequest(
            f"topk_sample_logprobs: {request.topk_sample_logprobs} at each of up to {tokens} tokens is more than "
            f"{MAX_SAMPLE_CELLS} values; ask for at most {MAX_SAMPLE_CELLS // tokens}, or set max_tokens"
        )
    if request.record_stability_info:
        raise InvalidRequest(
            "record_stability_info: this server records nothing about a sequence's stability, so there is no "
            "stable_reinforce here; leave it out, and train with importance_sampling, ppo, cispo or gspo"
        )
    _check_prompt_extras(request, info)


def _check_prompt_extras(request: m.SampleRequest, info: BaseModelInfo) -> None:
    length = len(request.prompt.tokens)
    last_n = request.prompt_logprobs_last_n
    if last_n is not None and not (request.prompt_logprobs and last_n < length):
        raise InvalidRequest(
            f"prompt_logprobs_last_n: {last_n} needs prompt_logprobs, and to be between 1 and {length - 1}, one less "
            "than the prompt's tokens"
        )
    for name, width in (
        ("topk_prompt_logprobs", request.topk_prompt_logprobs),
        ("prompt_alt_tokens_k", request.prompt_alt_tokens_k),
    ):
        if width * length > MAX_PROMPT_CELLS:
            raise InvalidRequest(
                f"{name}: {width} at each of {length} prompt tokens is more than {MAX_PROMPT_CELLS} values; ask for "
                f"at most {MAX_PROMPT_CELLS // length}"
            )


def target_tokens(request: m.SampleRequest, info: BaseModelInfo) -> TensorData | SparseTensor | None:
    """The tokens whose log-probabilities are requested at the prompt's positions, checked.

    Raises:
        InvalidRequest: if they are not int64 [len(prompt) - 1, K] of token ids, -1 for none.
    """
    if request.target_prompt_logprobs is None:
        return None
    field = "target_prompt_logprobs"
    tensor = tensor_of_json(request.target_prompt_logprobs, field)
    is_sparse = isinstance(tensor, SparseTensor)
    shape, rows = tensor.shape, len(request.prompt.tokens) - 1
    if len(shape) != 2 or shape[0] != rows or shape[0] * shape[1] > MAX_PROMPT_CELLS:
        raise InvalidRequest(
            f"{field}: shape {list(shape)}; it must be [{rows}, K], a row for each prompt token "
            f"after the first, and at most {MAX_PROMPT_CELLS} values"
        )
    ids = tensor.values if is_sparse else tensor.array
    if (
        ids.dtype.kind != "i"
        or not ids.size
        or ids.min() < -1
        or ids.max() >= info.vocab_size
        or ids.max() < 0
    ):
        raise InvalidRequest(
            f"{field}: must be int64 token ids from 0 to {info.vocab_size - 1} (at least one), or -1 where nothing is "
            "asked for"
        )
    return tensor
