"""Messages to bytes and back: protobuf for training passes, their results and samples, JSON for the rest.

Every decoder checks the sizes that the bytes themselves state before it builds an array, and raises `InvalidRequest`
for what it can't read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.endpoints import OPERATIONS, PROTOBUF
from twinkle.protocol.errors import InvalidRequest, TooLarge
from twinkle.protocol.types import (
    FROM_WIRE,
    Array,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    JsonTensor,
    LossFnConfig,
    ModelInput,
    OtherChunk,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SparseTensor,
    TensorData,
    TopkRow,
    TopkTable,
)
from twinkle.protocol.validation import MAX_NAME, describe_validation

Model = TypeVar("Model", bound=BaseModel)

_DTYPES: dict[int, np.dtype] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}

# A sparse tensor of a few bytes may expand to a huge dense one: most dense values in a request, 256 MiB as int64.
MAX_DENSE_ELEMENTS = 2**25
_MAX_DIMENSIONS = 8

# Two bytes of a body can be a datum or a chunk, which takes a thousand as an object: most of them in a request.
MAX_DATUMS = 2**14
_MAX_PARTS = 2**17

# The least that a decoder should support (RFC 8878, 3.1.1.1.2); a header of a few bytes can ask for gigabytes.
_MAX_WINDOW_BYTES = 8 * 2**20


class RunPlace(BaseModel):
    """A request's place in its run's order."""

    model_id: str
    seq_id: int


# ---------------------------------------------------------------- JSON


def decode_json(model: type[Model], body: bytes) -> Model:
    """A JSON body as a message.

    Raises:
        InvalidRequest: naming each field that is wrong.
    """
    try:
        return model.model_validate_json(body or b"{}", context=FROM_WIRE)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error)) from error


def decode_query(model: type[Model], body: bytes, fields: Mapping[str, str]) -> Model:
    """A message from a JSON body (or none) and the fields of path and query string, which take precedence.

    Raises:
        InvalidRequest: naming each field that is wrong.
    """
    try:
        values = from_json(body or b"{}", allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"body: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InvalidRequest("body: must be a JSON object")
    try:
        return model.model_validate({**cast(dict[str, object], values), **fields}, context=FROM_WIRE)
    except ValidationError as error:
        raise InvalidRequest(describe_validation(error)) from error


def encode_json(message: BaseModel) -> bytes:
    return message.model_dump_json(exclude_none=True).encode()


# ---------------------------------------------------------------- operations and their results


def encode(request: m.Operation) -> bytes:
    return (
        encode_forward_backward(request)
        if isinstance(request, m.ForwardBackwardRequest)
        else encode_json(request)
    )


def decode(kind: type[m.Operation], body: bytes) -> m.Operation:
    """An operation from its body.

    Raises:
        InvalidRequest: if it can't be read.
        TooLarge: if it would take too much memory.
    """
    if kind is m.ForwardBackwardRequest:
        return decode_forward_backward(body)
    return cast(m.Operation, decode_json(cast(Any, kind), body))


@dataclass(frozen=True, eq=False)
class Encoded:
    """A result or failure, encoded once for whoever stores, sends or reads it.

    Attributes:
        kind: name of its type.
    """

    kind: str
    body: bytes


CONTENT_TYPES = {"ForwardBackwardOutput": PROTOBUF, "SampleResponse": PROTOBUF}
"""Of results by kind; of all others JSON."""

_RESULTS: dict[str, type[m.Result]] = {endpoint.result.__name__: endpoint.result for endpoint in OPERATIONS}


def encode_result(result: m.Result | m.Failure) -> Encoded:
    if isinstance(result, ForwardBackwardOutput):
        body = encode_forward_backward_output(result)
    else:
        body = encode_sample(result) if isinstance(result, SampleResponse) else encode_json(result)
    return Encoded(type(result).__name__, body)


def decode_result(encoded: Encoded) -> m.Result | m.Failure:
    kind = _RESULTS.get(encoded.kind, m.Failure)
    if kind is ForwardBackwardOutput:
        return decode_forward_backward_output(encoded.body)
    if kind is SampleResponse:
        return decode_sample(encoded.body)
    return cast("m.Result | m.Failure", decode_json(cast(Any, kind), encoded.body))


# ---------------------------------------------------------------- tensors


def _encode_tensor(tensor: TensorData) -> pb.Tensor:
    is_int = tensor.array.dtype.kind == "i"
    array = np.ascontiguousarray(tensor.array, "<i8" if is_int else "<f4")
    dtype = pb.DTYPE_INT64 if is_int else pb.DTYPE_FLOAT32
    return pb.Tensor(dense=array.tobytes(), dtype=dtype, shape=array.shape)


def _encode_sparse(matrix: SparseTensor) -> pb.Tensor:
    is_int = matrix.values.dtype.kind == "i"
    sparse = pb.SparseCsr(
        values=np.ascontiguousarray(matrix.values, "<i8" if is_int else "<f4").tobytes(),
        crow_indices=np.ascontiguousarray(matrix.crow_indices, "<i8").tobytes(),
        col_indices=np.ascontiguousarray(matrix.col_indices, "<i8").tobytes(),
    )
    dtype = pb.DTYPE_INT64 if is_int else pb.DTYPE_FLOAT32
    return pb.Tensor(sparse_csr=sparse, dtype=dtype, shape=matrix.shape)


def tensor_of_json(tensor: JsonTensor, name: str) -> TensorData | SparseTensor:
    """A tensor of a JSON body, checked.

    Raises:
        InvalidRequest: if the values don't fit the shape.
    """
    dtype = np.int64 if tensor.dtype == "int64" else np.float32
    try:
        values = np.asarray(tensor.data, dtype)
        rows, cols = (
            None if indices is None else np.asarray(indices, np.int64)
            for indices in (tensor.sparse_crow_indices, tensor.sparse_col_indices)
        )
    except (OverflowError, ValueError) as error:
        raise InvalidRequest(f"{name}: values that are no {tensor.dtype} ({error})") from error
    shape = tuple(tensor.shape) if tensor.shape is not None else (len(values),)
    _check_shape(shape, name)
    if rows is None or cols is None:
        if math.prod(shape) != len(values) or rows is not cols:
            raise InvalidRequest(
                f"{name}: shape {list(shape)} needs {math.prod(shape)} values, {len(values)} were sent (a sparse "
                "tensor names both its rows and its columns)"
            )
        return TensorData(values.reshape(shape))
    if len(shape) != 2:
        raise InvalidRequest(f"{name}: a sparse tensor needs shape [rows, cols], got {list(shape)}")
    matrix = SparseTensor(values, rows, cols, (shape[0], shape[1]))
    matrix.check(name)
    return matrix


def _check_shape(shape: Sequence[int], name: str) -> None:
    # In this order: a product of many large sizes is a number of megabytes, and takes hours.
    possible = len(shape) <= _MAX_DIMENSIONS and all(0 <= size <= MAX_DENSE_ELEMENTS for size in shape)
    if not possible or math.prod(shape) > MAX_DENSE_ELEMENTS:
        shown = ", ".join(str(size)[:20] for size in shape[:_MAX_DIMENSIONS])
        raise InvalidRequest(
            f"{name}: shape [{shown}{', ...' if len(shape) > _MAX_DIMENSIONS else ''}] is not possible here (at most "
            f"{MAX_DENSE_ELEMENTS} values in {_MAX_DIMENSIONS} dimensions)"
        )


def _from_bytes(data: bytes, dtype: int, name: str) -> Array:
    """The flat array that the bytes hold; bfloat16 is widened to float32."""
    if dtype == pb.DTYPE_BFLOAT16:
        if len(data) % 2:
            raise InvalidRequest(f"{name}: {len(data)} bytes are no whole number of bfloat16 values")
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    numpy_dtype = _DTYPES.get(dtype)
    if numpy_dtype is None:
        raise InvalidRequest(f"{name}: unknown tensor dtype {dtype}; use float32, int64, int32 or bfloat16")
    if len(data) % numpy_dtype.itemsize:
        raise InvalidRequest(f"{name}: {len(data)} bytes are no whole number of {numpy_dtype} values")
    return np.frombuffer(data, numpy_dtype)


def _to_wire_type(array: Array) -> Array:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)


def _decode_sparse(tensor: pb.Tensor, shape: tuple[int, ...], name: str) -> SparseTensor:
    sparse = tensor.sparse_csr
    if len(shape) != 2:
        raise InvalidRequest(f"{name}: a sparse tensor needs shape [rows, cols], got {list(shape)}")
    matrix = SparseTensor(
        values=_to_wire_type(_from_bytes(sparse.values, tensor.dtype, name)),
        crow_indices=_from_bytes(sparse.crow_indices, pb.DTYPE_INT64, name),
        col_indices=_from_bytes(sparse.col_indices, pb.DTYPE_INT64, name),
        shape=(shape[0], shape[1]),
    )
    matrix.check(name)
    return matrix


def _decode_tensor(tensor: pb.Tensor, name: str) -> TensorData:
    shape = tuple(tensor.shape)
    _check_shape(shape, name)
    if tensor.WhichOneof("layout") == "sparse_csr":
        return TensorData(_decode_sparse(tensor, shape, name).to_numpy())
    array = _from_bytes(tensor.dense, tensor.dtype, name)
    shape = shape or (len(array),)
    if math.prod(shape) != len(array):
        raise InvalidRequest(
            f"{name}: shape {list(shape)} needs {math.prod(shape)} values, {len(array)} were sent"
        )
    return TensorData(_to_wire_type(array.reshape(shape)))


# ---------------------------------------------------------------- forward_backward


def encode_forward_backward(request: m.ForwardBackwardRequest) -> bytes:
    message = pb.ForwardBackwardRequest(
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
        data=[_encode_datum(datum) for datum in request.data],
    )
    for name, value in request.loss_fn_config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[name].text = value
        else:
            message.loss_fn_config[name] = value
            message.loss_fn_config_v2[name].number = value
    return message.SerializeToString()


def _encode_datum(datum: Datum) -> pb.Datum:
    tokens = np.ascontiguousarray(datum.model_input.tokens, "<i4").tobytes()
    message = pb.Datum(model_input=[pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens))])
    for name, tensor in datum.loss_fn_inputs.items():
        message.loss_fn_inputs[name].CopyFrom(_encode_tensor(tensor))
    return message


def decode_forward_backward(body: bytes) -> m.ForwardBackwardRequest:
    """A training pass from protobuf.

    Raises:
        InvalidRequest: if the bytes are not such a message, or a tensor's bytes don't match its shape.
    """
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        if body.lstrip()[:1] == b"{":
            raise InvalidRequest(
                "body: this is JSON, and training passes are taken as application/x-protobuf only; the Tinker SDK "
                "sends that from 0.22 on (pip install 'tinker>=0.22')"
            ) from error
        raise InvalidRequest(f"body: not a protobuf ForwardBackwardRequest ({error})") from error
    _check_counts(message)
    _check_sparse_size(message)
    config: LossFnConfig = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("kind") == "text" else value.number
    return m.ForwardBackwardRequest(
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=[_decode_datum(datum, f"data[{i}]") for i, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=config,
        forward_only=message.forward_only,
    )


def place_of_forward_backward(body: bytes) -> RunPlace | None:
    """The place of a training pass that may be invalid otherwise; None if the bytes are not a training pass."""
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        return None
    return RunPlace(model_id=message.model_id, seq_id=message.seq_id)


def place_of_json(body: bytes) -> RunPlace | None:
    """The place of a JSON request on a run that may be invalid otherwise; None if it can't be read."""
    try:
        return RunPlace.model_validate_json(body, context=FROM_WIRE)
    except ValidationError:
        return None


def _check_counts(message: pb.ForwardBackwardRequest) -> None:
    if len(message.data) > MAX_DATUMS:
        raise TooLarge(f"data: {len(message.data)} datums, more than {MAX_DATUMS}; send fewer at once")
    parts = len(message.loss_fn_config) + len(message.loss_fn_config_v2)
    parts += sum(len(datum.model_input) + len(datum.loss_fn_inputs) for datum in message.data)
    if parts > _MAX_PARTS:
        raise TooLarge(
            f"data: {parts} chunks and inputs in all, more than {_MAX_PARTS}; send fewer datums at once"
        )


def _check_sparse_size(message: pb.ForwardBackwardRequest) -> None:
    elements = 0
    for i, datum in enumerate(message.data):
        for name, tensor in datum.loss_fn_inputs.items():
            if tensor.WhichOneof("layout") == "sparse_csr":
                _check_shape(tensor.shape, f"data[{i}].loss_fn_inputs.{name[:MAX_NAME]}")
                elements += math.prod(tensor.shape)
    if elements > MAX_DENSE_ELEMENTS:
        raise TooLarge(
            f"data: the sparse tensors of this request stand for {elements} values, more than {MAX_DENSE_ELEMENTS}; "
            "send fewer datums at once"
        )


def _decode_datum(message: pb.Datum, where: str) -> Datum:
    chunks: list[EncodedTextChunk | OtherChunk] = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("kind")
        if kind == "encoded_text":
            tokens = _from_bytes(chunk.encoded_text.tokens, pb.DTYPE_INT32, f"{where}.model_input")
            if len(tokens) and tokens.min() < 0:
                raise InvalidRequest(f"{where}.model_input: token id {tokens.min()} is negative")
            chunks.append(EncodedTextChunk.model_construct(tokens=tokens))
        else:
            chunks.append(OtherChunk.model_construct(type=kind or "image"))
    inputs = {
        name: _decode_tensor(tensor, f"{where}.loss_fn_inputs.{name[:MAX_NAME]}")
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum(ModelInput.model_construct(chunks=chunks), inputs)


def encode_forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """A training pass's result as protobuf.

    A datum whose arrays differ from its predecessor's in fields or trailing dimensions begins a new record.
    """
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics)
    for group in _same_layout(output.loss_fn_outputs):
        record = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type, num_datums=len(group))
        for name in group[0]:
            record.fields[name].CopyFrom(_encode_batched([datum[name].array for datum in group]))
    return message.SerializeToString()


def _same_layout(datums: Iterable[dict[str, TensorData]]) -> list[list[dict[str, TensorData]]]:
    groups: list[list[dict[str, TensorData]]] = []
    previous: object = None
    for datum in datums:
        layout = {name: (tensor.array.dtype.kind, tensor.array.shape[1:]) for name, tensor in datum.items()}
        if layout != previous:
            groups.append([])
            previous = layout
        groups[-1].append(datum)
    return groups


def _encode_batched(arrays: Sequence[Array]) -> pb.BatchedTensor:
    is_int = arrays[0].dtype.kind == "i"
    chunks = [np.ascontiguousarray(array, "<i8" if is_int else "<f4").tobytes() for array in arrays]
    offsets = np.cumsum([0] + [len(chunk) for chunk in chunks])
    return pb.BatchedTensor(
        data=b"".join(chunks),
        offsets=offsets.astype("<i8").tobytes(),
        dtype=pb.DTYPE_INT64 if is_int else pb.DTYPE_FLOAT32,
        trailing_shape=arrays[0].shape[1:],
    )


def decode_forward_backward_output(body: bytes) -> ForwardBackwardOutput:
    message = pb.ForwardBackwardOutput.FromString(body)
    outputs: list[dict[str, TensorData]] = []
    for record in message.loss_fn_outputs:
        columns = {name: _decode_batched(field, name) for name, field in record.fields.items()}
        outputs.extend(
            {name: column[i] for name, column in columns.items()} for i in range(record.num_datums)
        )
    return ForwardBackwardOutput(outputs, dict(message.metrics), message.loss_fn_output_type)


def _decode_batched(field: pb.BatchedTensor, name: str) -> list[TensorData]:
    offsets = _from_bytes(field.offsets, pb.DTYPE_INT64, name)
    shape = (-1, *field.trailing_shape)
    arrays = (
        _from_bytes(field.data[a:b], field.dtype, name) for a, b in zip(offsets, offsets[1:], strict=False)
    )
    return [TensorData(_to_wire_type(array.reshape(shape))) for array in arrays]


# ---------------------------------------------------------------- sample


def encode_sample(response: SampleResponse) -> bytes:
    message = pb.SampleResponse(prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)
    for sequence in response.sequences:
        encoded = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
        )
        if sequence.logprobs is not None:
            encoded.logprobs = np.asarray(sequence.logprobs, "<f4").tobytes()
        if sequence.topk_logprobs is not None:
            _fill_topk(encoded.topk_sampled_logprobs, sequence.topk_logprobs)
    if response.prompt_logprobs is not None:
        values = [math.nan if value is None else value for value in response.prompt_logprobs]
        message.prompt_logprobs = np.asarray(values, "<f4").tobytes()
    if response.topk_prompt_logprobs is not None:
        _fill_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    targets = response.target_prompt_logprobs
    if targets is not None:
        encoded = _encode_sparse(targets) if isinstance(targets, SparseTensor) else _encode_tensor(targets)
        message.target_prompt_logprobs.CopyFrom(encoded)
    if response.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(_encode_tensor(response.prompt_alt_tokens.tokens))
        message.prompt_alt_tokens.logprobs.CopyFrom(_encode_tensor(response.prompt_alt_tokens.logprobs))
    return message.SerializeToString()


def _fill_topk(message: pb.TopkLogprobs, rows: Sequence[TopkRow]) -> None:
    table = TopkTable.of(rows)
    message.SetInParent()
    message.token_ids = np.ascontiguousarray(table.token_ids, "<i4").tobytes()
    message.logprobs = np.ascontiguousarray(table.logprobs, "<f4").tobytes()
    message.length, message.k = table.token_ids.shape


def decode_sample(body: bytes) -> SampleResponse:
    message = pb.SampleResponse.FromString(body)
    sequences = [
        SampledSequence(
            stop_reason="stop" if sequence.stop_reason == pb.STOP_REASON_STOP else "length",
            tokens=np.frombuffer(sequence.tokens, "<i4").tolist(),
            logprobs=np.frombuffer(sequence.logprobs, "<f4").tolist()
            if sequence.HasField("logprobs")
            else None,
            topk_logprobs=_decode_topk(sequence.topk_sampled_logprobs)
            if sequence.HasField("topk_sampled_logprobs")
            else None,
        )
        for sequence in message.sequences
    ]
    prompt_logprobs: list[float | None] | None = None
    if message.HasField("prompt_logprobs"):
        values = np.frombuffer(message.prompt_logprobs, "<f4")
        prompt_logprobs = [None if math.isnan(value) else value for value in values.tolist()]
    topk = _decode_topk(message.topk_prompt_logprobs) if message.HasField("topk_prompt_logprobs") else None
    return SampleResponse(
        sequences,
        prompt_logprobs,
        topk,
        message.prompt_cache_hit_tokens,
        _decode_target_logprobs(message),
        _decode_alt_tokens(message),
    )


def _decode_target_logprobs(message: pb.SampleResponse) -> TensorData | SparseTensor | None:
    if not message.HasField("target_prompt_logprobs"):
        return None
    tensor = message.target_prompt_logprobs
    if tensor.WhichOneof("layout") == "sparse_csr":
        return _decode_sparse(tensor, tuple(tensor.shape), "target_prompt_logprobs")
    return _decode_tensor(tensor, "target_prompt_logprobs")


def _decode_alt_tokens(message: pb.SampleResponse) -> PromptAltTokens | None:
    if not message.HasField("prompt_alt_tokens"):
        return None
    alternatives = message.prompt_alt_tokens
    return PromptAltTokens(
        _decode_tensor(alternatives.tokens, "prompt_alt_tokens.tokens"),
        _decode_tensor(alternatives.logprobs, "prompt_alt_tokens.logprobs"),
    )


def _decode_topk(table: pb.TopkLogprobs) -> list[TopkRow]:
    shape = table.length, table.k
    ids, logprobs = np.frombuffer(table.token_ids, "<i4"), np.frombuffer(table.logprobs, "<f4")
    return TopkTable(ids.reshape(shape), logprobs.reshape(shape)).rows()


# ---------------------------------------------------------------- compression


def compress(body: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(body)


def decompressed_size(body: bytes) -> int | None:
    """The decompressed size that a zstd body states, in bytes; None if it states none, or is not zstd."""
    try:
        size = zstandard.frame_content_size(body)
    except zstandard.ZstdError:
        return None
    return size if size >= 0 else None


def decompress(body: bytes, max_bytes: int) -> bytes:
    """Decompress a zstd body, allocating at most `max_bytes`.

    Raises:
        TooLarge: if it would be larger.
        InvalidRequest: if it is not zstd, or is truncated.
    """
    try:
        too_large = zstandard.frame_content_size(body) > max_bytes  # -1 if the frame doesn't say
        if not too_large:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
            return decompressor.decompress(body, max_output_size=max_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        if not _holds_more_than(body, max_bytes):
            raise InvalidRequest(
                f"body: Content-Encoding says zstd, but it can't be read ({error}); send one whole frame, with a "
                f"window of at most {_MAX_WINDOW_BYTES} bytes"
            ) from error
    raise TooLarge(f"body: more than {max_bytes} bytes after decompression; send fewer datums in one request")


def _holds_more_than(body: bytes, max_bytes: int) -> bool:
    """Whether the readable part of a damaged zstd body is longer than `max_bytes`."""
    size = 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(body) as reader:
            while size <= max_bytes and (part := reader.read(2**20)):
                size += len(part)
    except zstandard.ZstdError:
        pass  # what was read counts
    return size > max_bytes
