"""The values that messages are made of: tensors, model inputs, datums, sampling and optimizer parameters.

Names and defaults are those of the Tinker SDK, so that a loop written for one reads like a loop written for the
other. Everything is immutable and holds numpy arrays; nothing here knows how it is encoded (see `codec`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from twinkle.protocol.errors import InvalidRequest

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Array: TypeAlias = npt.NDArray[Any]

MAX_TOKEN_ID = 2**31 - 1


class Value(BaseModel):
    """Base of the JSON values: immutable; fields that we don't know are passed over, as the SDK does."""

    model_config = ConfigDict(
        frozen=True, arbitrary_types_allowed=True, extra="ignore", protected_namespaces=()
    )


# ---------------------------------------------------------------- tensors


def _as_wire_array(values: object, name: str) -> Array:
    """Any array-like as float32 or int64, the two types of the wire.

    Raises:
        InvalidRequest: if the values are not numbers, or ragged.
    """
    if hasattr(values, "detach"):  # a torch tensor, which this package does not import
        values = values.detach().cpu().numpy()  # pyright: ignore
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidRequest(f"{name}: not a rectangular array of numbers ({error})") from error
    if array.dtype.kind in "iub":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    raise InvalidRequest(f"{name}: expected numbers, got {array.dtype}")


# Lists of these names are floats even where all their entries are whole numbers.
_FLOAT_INPUTS = frozenset({"weights", "advantages", "logprobs"})


@dataclass(frozen=True, eq=False)
class TensorData:
    """A dense array as it travels.

    Attributes:
        array: float32 or int64, any shape.
    """

    array: Array

    @classmethod
    def from_numpy(cls, array: object) -> TensorData:
        return cls(_as_wire_array(array, "tensor"))

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    @property
    def dtype(self) -> Literal["float32", "int64"]:
        return "int64" if self.array.dtype.kind == "i" else "float32"

    @property
    def data(self) -> list[Any]:
        """The values in row-major order, as plain numbers."""
        return self.array.ravel().tolist()

    def to_numpy(self) -> Array:
        return self.array

    def tolist(self) -> list[Any]:
        return self.array.tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype=dtype, copy=copy) if copy else np.asarray(self.array, dtype=dtype)

    def __len__(self) -> int:
        return len(self.array)


# ---------------------------------------------------------------- model input


def _to_tokens(values: object) -> Int32Array:
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:
        return cast(Int32Array, values)
    array: Array = np.asarray(values) if not isinstance(values, list) or values else np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError("tokens must be a flat list of integers")
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN_ID):
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}")
    return array.astype(np.int32)


def _token_list(values: Int32Array) -> list[int]:
    return values.tolist()


Tokens: TypeAlias = Annotated[
    Any, BeforeValidator(_to_tokens), PlainSerializer(_token_list, return_type=list[int])
]


class EncodedTextChunk(Value):
    """A run of text as token ids, int32 [T]."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: Tokens

    @property
    def length(self) -> int:
        return len(self.tokens)


class OtherChunk(Value):
    """An image or audio chunk, kept only so that it can be refused with a sentence that names it."""

    type: Literal["image", "image_asset_pointer", "dmel"]


Chunk: TypeAlias = Annotated[EncodedTextChunk | OtherChunk, Field(discriminator="type")]


class ModelInput(Value):
    """What a model reads: chunks, one after the other."""

    chunks: list[Chunk] = Field(default_factory=list[Chunk])

    @classmethod
    def from_ints(cls, tokens: object) -> ModelInput:
        """From token ids: a list, or an integer array [T].

        Raises:
            InvalidRequest: if they are none; text is encoded by a Template first.
        """
        try:
            ids = _to_tokens(tokens)
        except ValueError as error:
            raise InvalidRequest(
                f"tokens: {error}, got {str(tokens)[:60]!r}; encode text with a Template"
            ) from error
        return cls(chunks=[EncodedTextChunk(tokens=ids)])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(chunks=[])

    @property
    def length(self) -> int:
        return len(self.tokens())

    def tokens(self) -> Int32Array:
        """All token ids, int32 [T].

        Raises:
            InvalidRequest: if there is a chunk that is not text.
        """
        texts: list[Int32Array] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise InvalidRequest(
                    f"model_input: a chunk of type {chunk.type!r} was sent; this server's models read text only: "
                    "send encoded_text chunks"
                )
            texts.append(chunk.tokens)
        if len(texts) == 1:
            return texts[0]
        return np.concatenate(texts) if texts else np.zeros(0, np.int32)

    def to_ints(self) -> list[int]:
        return self.tokens().tolist()


# ---------------------------------------------------------------- training


def _to_tensors(inputs: Mapping[str, object]) -> dict[str, TensorData]:
    tensors: dict[str, TensorData] = {}
    for name, value in inputs.items():
        if isinstance(value, TensorData):
            tensors[name] = value
            continue
        array = _as_wire_array(value, name)
        tensors[name] = TensorData(array.astype(np.float32) if name in _FLOAT_INPUTS else array)
    return tensors


@dataclass(frozen=True, eq=False, init=False)
class Datum:
    """One sequence to train on.

    Attributes:
        model_input: the tokens read, [T].
        loss_fn_inputs: what the loss needs beside the log-probabilities, by name; for cross_entropy
            `target_tokens` int64 [T] (the token that should follow each one read) and `weights` float32 [T].
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]

    def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, object] | None = None) -> None:
        """`loss_fn_inputs` may be lists, numpy arrays, torch tensors or TensorData.

        Raises:
            InvalidRequest: naming an input that is no array of numbers.
        """
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", _to_tensors(loss_fn_inputs or {}))


LossFnConfig: TypeAlias = dict[str, float | str]


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput:
    """Result of a training pass.

    Attributes:
        loss_fn_outputs: one mapping a datum, in the order of the request; `logprobs` is float32 [T].
        metrics: `name:reduction` -> value over the whole request; `loss:sum` is always there.
        loss_fn_output_type: free text, the name of what `loss_fn_outputs` holds.
    """

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


class LoraConfig(Value):
    """Shape of an adapter.

    Attributes:
        rank: rank of the low-rank terms.
        seed: the same seed gives the same initial adapter; None draws one.
        train_attn, train_mlp, train_unembed: which linear layers get a low-rank term.
        alpha: the term is scaled by alpha / rank; None is the server's default of 32. (A Twinkle addition.)
    """

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float | None = None


class AdamParams(Value):
    """One AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101: decay is decoupled from the gradient).

    Attributes:
        grad_clip_norm: the adapter's whole gradient is scaled down to this L2 norm; 0 is no clipping.
    """

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)


# ---------------------------------------------------------------- sampling


class SamplingParams(Value):
    """How to sample.

    Attributes:
        max_tokens: most tokens to generate; None goes on to the model's context length.
        seed: the same seed, prompt and weights give the same tokens; None draws one.
        stop: strings, or token ids, that end a sequence (the stop token stays in the tokens, a stop string in the
            text); None is the model's end-of-text tokens, `[]` is nothing at all.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; -1 is all.
        top_p: sample among the most likely tokens that together reach this probability.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=-1, ge=-1)
    top_p: float = Field(default=1.0, gt=0, le=1)


StopReason: TypeAlias = Literal["stop", "length"]

TopkRow: TypeAlias = list[tuple[int, float]] | None


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One generated sequence.

    Attributes:
        stop_reason: "stop" (a stop string or token came) or "length".
        tokens: the generated token ids, a stop token included.
        logprobs: one a token, under the distribution it was drawn from (temperature applied, before top_k/top_p).
        topk_logprobs: for each token the k likeliest (token id, log-probability), if asked for.
    """

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: list[TopkRow] | None = None


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """Result of `sample`.

    Attributes:
        sequences: `num_samples` of them.
        prompt_logprobs: one a prompt token, None for the first (nothing comes before it); None if not asked for.
        topk_prompt_logprobs: for each prompt token the k likeliest, None for the first.
        prompt_cache_hit_tokens: prompt tokens whose keys and values were already there.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopkRow] | None = None
    prompt_cache_hit_tokens: int = 0
