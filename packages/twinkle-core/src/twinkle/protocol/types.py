"""The values that messages are made of: tensors, model inputs, datums, sampling and optimizer parameters.

Names and defaults are those of the Tinker SDK, so that a loop for one reads like a loop for the other. Everything is
immutable and holds numpy arrays; encoding is in `codec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.validation import describe_validation, unknown_name

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Array: TypeAlias = npt.NDArray[Any]

MAX_TOKEN_ID = 2**31 - 1

Model = TypeVar("Model", bound=BaseModel)


class Value(BaseModel):
    """Base of the JSON values: immutable; unknown fields are ignored, as in the SDK."""

    model_config = ConfigDict(
        frozen=True,
        arbitrary_types_allowed=True,
        extra="ignore",
        protected_namespaces=(),
        # JSON has no infinite numbers: "Infinity" and "NaN" travel as strings, which the SDK reads too.
        ser_json_inf_nan="strings",
    )


FROM_WIRE: Final = "from the wire"
"""Validation context of received values, in which unknown names are ignored."""


class Parameters(Value):
    """Base of the values that users write: anything wrong with one is an `InvalidRequest`, even a misspelt name."""

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_is_wrong(
        cls, values: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if info.context == FROM_WIRE or isinstance(values, cls):
            return handler(values)
        if isinstance(values, Mapping):
            given = cast(Mapping[str, object], values)
            wrong = [name for name in given if name not in cls.model_fields]
            if wrong:
                raise InvalidRequest(f"{cls.__name__}: {unknown_name(wrong[0], cls.model_fields)}")
        try:
            return handler(values)
        except ValidationError as error:
            raise InvalidRequest(f"{cls.__name__}: {describe_validation(error)}") from error


def make(model: type[Model], **fields: object) -> Model:
    """Build a message from a user's arguments.

    Raises:
        InvalidRequest: naming each invalid field.
    """
    try:
        return model(**fields)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error)) from error


# ---------------------------------------------------------------- tensors


def _as_wire_array(values: object, name: str) -> Array:
    """An array-like as float32 or int64, the two types of the wire.

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


# Lists under these names are floats even if all their entries are whole numbers.
_FLOAT_INPUTS = frozenset({"weights", "advantages", "logprobs", "sequence_ratio_mask"})


@dataclass(frozen=True, eq=False)
class TensorData:
    """A dense array of the wire.

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


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A matrix in compressed rows (CSR).

    Attributes:
        values: float32 or int64 [n].
        crow_indices: int64 [rows + 1], where each row begins in `values`.
        col_indices: int64 [n], the column of each value.
        shape: (rows, columns).
    """

    values: Array
    crow_indices: Int64Array
    col_indices: Int64Array
    shape: tuple[int, int]

    def to_numpy(self, pad_value: float = 0) -> Array:
        """The dense matrix, with `pad_value` where no value is stored.

        Raises:
            InvalidRequest: if the rows and columns describe no such matrix.
        """
        self.check("tensor")
        dense = np.full(self.shape, pad_value, self.values.dtype)
        dense[self.row_indices(), self.col_indices] = self.values
        return dense

    def row_indices(self) -> Int64Array:
        """The row of each value, int64 [n]."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.crow_indices))

    def check(self, name: str) -> None:
        """
        Raises:
            InvalidRequest: if the rows and columns describe no such matrix; it names the field `name`.
        """
        rows, cols = self.crow_indices, self.col_indices
        if len(rows) != self.shape[0] + 1 or len(cols) != len(self.values):
            raise InvalidRequest(
                f"{name}: a sparse tensor needs shape [rows, cols], rows + 1 row pointers and one column a value"
            )
        # Within these bounds differences can't overflow, and row counts add up to the number of values.
        in_bounds = rows.min() >= 0 and rows.max() <= len(cols)
        if not in_bounds or rows[0] != 0 or rows[-1] != len(cols) or (np.diff(rows) < 0).any():
            raise InvalidRequest(
                f"{name}: the row pointers of a sparse tensor must rise from 0 to the number of values"
            )
        if len(cols) and (cols.min() < 0 or cols.max() >= self.shape[1]):
            raise InvalidRequest(
                f"{name}: a column of a sparse tensor is outside of its shape {list(self.shape)}"
            )


class _FirstErrorEnds(FailFast):
    """Stops at a list's first invalid entry: describing every one would take a thousand times the list's memory."""

    def __hash__(self) -> int:  # members of a union must be hashable in Python 3.11
        return hash(self.fail_fast)


Integers: TypeAlias = Annotated[list[int], _FirstErrorEnds()]
Floats: TypeAlias = Annotated[list[float], _FirstErrorEnds()]
Texts: TypeAlias = Annotated[list[str], _FirstErrorEnds()]


class JsonTensor(Value):
    """A tensor inside a JSON body: dense, or sparse in compressed rows (CSR).

    Attributes:
        data: the values in row-major order; of a sparse tensor, only those stored.
        shape: default: one-dimensional.
        sparse_crow_indices: where each row begins in `data`, [rows + 1]; None if dense.
        sparse_col_indices: the column of each value.
    """

    data: Integers | Floats
    dtype: Literal["float32", "int64"]
    shape: Integers | None = None
    sparse_crow_indices: Integers | None = None
    sparse_col_indices: Integers | None = None


# ---------------------------------------------------------------- model input


_NO_TOKENS: frozenset[type] = frozenset({str, bytes, list, tuple, dict, type(None)})


def _to_tokens(values: object) -> Int32Array:
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:
        return cast(Int32Array, values)
    # In an array, every string would take as much memory as the longest.
    if isinstance(values, list) and not _NO_TOKENS.isdisjoint(map(type, cast(list[object], values))):
        raise ValueError("tokens must be a flat list of integers")
    array: Array = np.asarray(values) if not isinstance(values, list) or values else np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError("tokens must be a flat list of integers")
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN_ID):
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}")
    return array.astype(np.int32)


def _token_list(values: Int32Array) -> list[int]:
    return values.tolist()


Tokens: TypeAlias = Annotated[
    Any,
    BeforeValidator(_to_tokens),
    PlainSerializer(_token_list, return_type=list[int]),
    WithJsonSchema(
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}, "validation"
    ),
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
    chunks: Annotated[list[Chunk], FailFast()] = Field(default_factory=list[Chunk])

    @classmethod
    def from_ints(cls, tokens: object) -> ModelInput:
        """From token ids: a list, or an integer array [T].

        Raises:
            InvalidRequest: if they are not token ids; encode text with a Template first.
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
        return len(self.tokens)

    @cached_property
    def tokens(self) -> Int32Array:
        """All token ids, int32 [T].

        Raises:
            InvalidRequest: if a chunk is not text.
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
        return self.tokens.tolist()


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
        model_input: the input tokens, [T].
        loss_fn_inputs: what the loss needs besides the log-probabilities, by name; for cross_entropy `target_tokens`
            int64 [T] (the token that should follow each input token) and `weights` float32 [T]; both may be [T, K], for
            K candidates at each position.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]

    def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, object] | None = None) -> None:
        """`loss_fn_inputs` may be lists, numpy arrays, torch tensors or TensorData.

        Raises:
            InvalidRequest: naming an input that is not an array of numbers.
        """
        object.__setattr__(self, "model_input", model_input)
        object.__setattr__(self, "loss_fn_inputs", _to_tensors(loss_fn_inputs or {}))


LossFnConfig: TypeAlias = dict[str, float | str]


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput:
    """Result of a training pass.

    Attributes:
        loss_fn_outputs: one mapping per datum, in the request's order; `logprobs` is float32 with the shape of
            `target_tokens`.
        metrics: `name:reduction` -> value over the whole request; `loss:sum` is always there.
        loss_fn_output_type: free text that names what `loss_fn_outputs` holds.
    """

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "ArrayRecord"


class LoraConfig(Parameters):
    """Shape of an adapter.

    Attributes:
        rank: rank of the low-rank terms.
        seed: the same seed gives the same initial adapter; default: random.
        train_attn, train_mlp, train_unembed: which linear layers get a low-rank term.
        alpha: the term is scaled by alpha / rank; default: the server's, 32. (A Twinkle addition.)
    """

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True
    alpha: float | None = None


class AdamParams(Parameters):
    """One AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101: decay is decoupled from the gradient).

    Attributes:
        grad_clip_norm: the adapter's whole gradient is scaled down to this L2 norm; 0 disables clipping.
    """

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)


# ---------------------------------------------------------------- sampling


class SamplingParams(Parameters):
    """How to sample.

    Attributes:
        max_tokens: most tokens to generate; default: up to the model's context length.
        seed: of the random numbers, which don't depend on concurrent requests; default: random. With the same prompt
            and weights they give the same tokens on a server in float32 (except where a draw falls within rounding,
            about 1e-6, of the next token). In bfloat16 or float16 the rounding of logits depends on the batch's shape,
            so tokens occasionally differ with the other requests in it; log-probabilities are always those of the
            tokens returned.
        stop: strings, or token ids, that end a sequence (a stop token is kept in the tokens, a stop string in the
            text); default: the model's end-of-text tokens; `[]` disables all, end-of-text included.
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; -1 means all.
        top_p: sample among the most likely tokens that together reach this probability.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: str | Texts | Integers | None = None
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=-1, ge=-1, le=2**31 - 1)
    top_p: float = Field(default=1.0, gt=0, le=1)


StopReason: TypeAlias = Literal["stop", "length"]

TopkRow: TypeAlias = list[tuple[int, float]] | None

EMPTY_LOGPROB: Final = -99999.0
"""An empty cell of a top-k table, as on the wire."""


@dataclass(frozen=True, eq=False)
class TopkTable(Sequence[TopkRow]):
    """The k most likely tokens at each of n positions: a list of rows, held as two arrays.

    Attributes:
        token_ids: int32 [n, k].
        logprobs: float32 [n, k]; `EMPTY_LOGPROB` where there is no token.
    """

    token_ids: Int32Array
    logprobs: Float32Array

    @classmethod
    def of(cls, rows: Sequence[TopkRow]) -> TopkTable:
        """From rows of any lengths, some of them None."""
        if isinstance(rows, TopkTable):
            return rows
        table = cls.empty(len(rows), max((len(row) for row in rows if row is not None), default=0))
        for i, row in enumerate(rows):
            if row:
                table.token_ids[i, : len(row)], table.logprobs[i, : len(row)] = zip(*row, strict=True)
        return table

    @classmethod
    def empty(cls, rows: int, k: int) -> TopkTable:
        return cls(np.zeros((rows, k), np.int32), np.full((rows, k), EMPTY_LOGPROB, np.float32))

    @classmethod
    def joined(cls, tables: Sequence[TopkTable]) -> TopkTable:
        """The tables' rows in one table; all tables have the same k."""
        if not tables:
            return cls.empty(0, 0)
        return cls(
            np.concatenate([table.token_ids for table in tables]),
            np.concatenate([table.logprobs for table in tables]),
        )

    def rows(self) -> list[TopkRow]:
        """As plain lists, the form that clients return."""
        return list(self)

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + self.logprobs.nbytes

    def __len__(self) -> int:
        return len(self.token_ids)

    @overload
    def __getitem__(self, index: int) -> TopkRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[TopkRow]: ...

    def __getitem__(self, index: int | slice) -> TopkRow | list[TopkRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, logprobs = self.token_ids[index].tolist(), self.logprobs[index].tolist()
        row = [(i, value) for i, value in zip(ids, logprobs, strict=True) if value != EMPTY_LOGPROB]
        return row or None

    def __eq__(self, other: object) -> bool:
        """Compares as a list of rows."""
        return isinstance(other, Sequence) and list(self) == list(cast("Sequence[object]", other))

    __hash__ = None  # pyright: ignore


@dataclass(frozen=True, eq=False)
class SampledSequence:
    """One generated sequence.

    Attributes:
        stop_reason: "stop" (at a stop string or token) or "length".
        tokens: the generated token ids, including a stop token.
        logprobs: one per token, under the distribution it was drawn from (temperature applied, before top_k/top_p).
        topk_logprobs: for each token the k most likely (token id, log-probability), if requested.
    """

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: Sequence[TopkRow] | None = None


@dataclass(frozen=True, eq=False)
class PromptAltTokens:
    """Samples from the model's next-token distribution at every position of a prompt after the first.

    Attributes:
        tokens: int64 [len(prompt) - 1, k]; row i holds alternatives to prompt token i + 1, sampled independently at the
            request's temperature.
        logprobs: float32 [len(prompt) - 1, k], of those tokens under the untempered distribution.
    """

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True, eq=False)
class SampleResponse:
    """Result of `sample`.

    Attributes:
        sequences: `num_samples` of them.
        prompt_logprobs: one per prompt token, None for the first (it has no predecessor); None if not requested.
        topk_prompt_logprobs: for each prompt token the k most likely, None for the first.
        prompt_cache_hit_tokens: prompt tokens whose keys and values were cached.
        target_prompt_logprobs: log-probabilities of the requested token ids at each position, float32 [len(prompt) - 1,
            K], 0 where none was requested; sparse if the request was.
        prompt_alt_tokens: alternatives to the prompt's tokens, if requested.
    """

    sequences: Sequence[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: Sequence[TopkRow] | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: TensorData | SparseTensor | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
