"""What a request must fulfil before it is queued. Each message names the field, what is allowed, and what to do."""

import difflib
from collections.abc import Iterable

import numpy as np

from twinkle.protocol import messages as m
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Datum, Int32Array, LoraConfig
from twinkle.server.backends.protocol import BaseModelInfo, LossInputs

MAX_SAMPLES = 1024
TARGETS = "target_tokens"


def check_base_model(name: str, served: str, field: str = "base_model") -> None:
    if normal_model_id(name) != normal_model_id(served):
        raise InvalidRequest(f"{field}: {name[:200]!r} is not served here; this server's model is {served!r}")


def normal_model_id(model_id: str) -> str:
    """The id without the hub it comes from: `ms://org/name` and `org/name` are the same model."""
    for scheme in ("ms://", "hf://", "file://"):
        model_id = model_id.removeprefix(scheme)
    return model_id.rstrip("/")


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
    if config.alpha is not None and not 0 < config.alpha < float("inf"):
        raise InvalidRequest(f"lora_config.alpha: {config.alpha} is not possible; choose a number above 0")


def check_optimizer(config: dict[str, object], field: str) -> None:
    kind = config.get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise InvalidRequest(f"{field}: optimizer {kind!r} is not available on this server; use 'adamw'")


# ---------------------------------------------------------------- training passes


def check_pass(request: m.ForwardBackwardRequest, info: BaseModelInfo, loss_fns: LossInputs) -> int:
    """
    Returns:
        How many tokens the pass costs.

    Raises:
        InvalidRequest: naming the first thing that is wrong.
    """
    if request.loss_fn not in loss_fns:
        raise InvalidRequest(_unknown("loss_fn", request.loss_fn, loss_fns))
    if not request.data:
        raise InvalidRequest("data: no datums were sent; send at least one")
    for i, datum in enumerate(request.data):
        _check_datum(datum, f"data[{i}]", (TARGETS, *loss_fns[request.loss_fn]), info)
    return sum(datum.model_input.length for datum in request.data)


def _unknown(field: str, given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{field}: {given[:80]!r} is not known here; use one of {', '.join(sorted(known))}{hint}"


def check_tokens(tokens: Int32Array, field: str, info: BaseModelInfo) -> None:
    if len(tokens) == 0:
        raise InvalidRequest(f"{field}: no tokens; send at least one")
    if len(tokens) > info.max_context_length:
        raise InvalidRequest(
            f"{field}: {len(tokens)} tokens, but this model takes at most {info.max_context_length}; truncate or split"
        )
    highest = int(tokens.max())
    if highest >= info.vocab_size:
        raise InvalidRequest(
            f"{field}: token id {highest} is outside of the vocabulary (0 to {info.vocab_size - 1}); "
            "was another model's tokenizer used?"
        )


def _check_datum(datum: Datum, where: str, needed: tuple[str, ...], info: BaseModelInfo) -> None:
    tokens = datum.model_input.tokens()
    check_tokens(tokens, f"{where}.model_input", info)
    inputs = datum.loss_fn_inputs
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise InvalidRequest(f"{where}.loss_fn_inputs: {', '.join(missing)} missing; send one value a token")
    for name, tensor in inputs.items():
        field = f"{where}.loss_fn_inputs.{name}"
        if tensor.array.shape != (len(tokens),):
            raise InvalidRequest(
                f"{field}: shape {tensor.shape}, but model_input has {len(tokens)} tokens; send one value a token"
            )
        if tensor.dtype == "float32" and not np.isfinite(tensor.array).all():
            first = int(np.flatnonzero(~np.isfinite(tensor.array))[0])
            raise InvalidRequest(
                f"{field}: entry {first} is {tensor.array[first]}; all must be finite numbers"
            )
    targets = inputs[TARGETS].array
    if targets.dtype.kind != "i":
        raise InvalidRequest(f"{where}.loss_fn_inputs.target_tokens: must be integers, got {targets.dtype}")
    if targets.min() < 0 or targets.max() >= info.vocab_size:
        wrong = int(targets.min()) if targets.min() < 0 else int(targets.max())
        raise InvalidRequest(
            f"{where}.loss_fn_inputs.target_tokens: token id {wrong} is outside of the vocabulary "
            f"(0 to {info.vocab_size - 1}); mask tokens with a weight of 0, not with an id"
        )


# ---------------------------------------------------------------- samples


def check_sample(request: m.SampleRequest, info: BaseModelInfo) -> None:
    check_tokens(request.prompt.tokens(), "prompt", info)
    params = request.sampling_params
    room = info.max_context_length - request.prompt.length
    if room < (params.max_tokens or 1) and not (request.prompt_logprobs and params.max_tokens == 1):
        raise InvalidRequest(
            f"sampling_params.max_tokens: {params.max_tokens} after a prompt of {request.prompt.length} tokens goes "
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
