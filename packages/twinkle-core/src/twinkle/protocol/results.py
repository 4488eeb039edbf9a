"""Results for readers of something else than protobuf: as JSON, and as plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic_core import to_json

from twinkle.protocol.codec import Encoded, decode_result
from twinkle.protocol.types import (
    ForwardBackwardOutput,
    SampleResponse,
    SparseTensor,
    TensorData,
    TopkRow,
    TopkTable,
)


def with_plain_rows(response: SampleResponse) -> SampleResponse:
    """The result in the form that a client without an encoding in between (local mode) returns: lists instead of
    tables.
    """

    def plain(rows: Sequence[TopkRow] | None) -> Sequence[TopkRow] | None:
        return rows.rows() if isinstance(rows, TopkTable) else rows

    sequences = [replace(each, topk_logprobs=plain(each.topk_logprobs)) for each in response.sequences]
    return replace(response, sequences=sequences, topk_prompt_logprobs=plain(response.topk_prompt_logprobs))


def result_as_json(encoded: Encoded) -> bytes:
    """The result as JSON; numbers that JSON can't represent are null."""
    result = decode_result(encoded)
    assert isinstance(result, ForwardBackwardOutput | SampleResponse), "all others are sent as JSON"
    if isinstance(result, SampleResponse):
        fields: dict[str, object] = {
            "type": "sample",
            "sequences": [
                {
                    "stop_reason": sequence.stop_reason,
                    "tokens": sequence.tokens,
                    "logprobs": sequence.logprobs,
                    "topk_logprobs": sequence.topk_logprobs and list(sequence.topk_logprobs),
                }
                for sequence in result.sequences
            ],
            "prompt_logprobs": result.prompt_logprobs,
            "topk_prompt_logprobs": result.topk_prompt_logprobs and list(result.topk_prompt_logprobs),
            "prompt_cache_hit_tokens": result.prompt_cache_hit_tokens,
            "target_prompt_logprobs": _tensor_as_json(result.target_prompt_logprobs),
            "prompt_alt_tokens": result.prompt_alt_tokens
            and {
                "tokens": _tensor_as_json(result.prompt_alt_tokens.tokens),
                "logprobs": _tensor_as_json(result.prompt_alt_tokens.logprobs),
            },
        }
    else:
        fields = {
            "loss_fn_output_type": result.loss_fn_output_type,
            "loss_fn_outputs": [
                {name: _tensor_as_json(tensor) for name, tensor in output.items()}
                for output in result.loss_fn_outputs
            ],
            "metrics": result.metrics,
        }
    return to_json(fields, inf_nan_mode="null")


def _tensor_as_json(tensor: TensorData | SparseTensor | None) -> dict[str, object] | None:
    if tensor is None:
        return None
    if isinstance(tensor, SparseTensor):
        return {
            "data": tensor.values.tolist(),
            "dtype": "int64" if tensor.values.dtype.kind == "i" else "float32",
            "shape": list(tensor.shape),
            "sparse_crow_indices": tensor.crow_indices.tolist(),
            "sparse_col_indices": tensor.col_indices.tolist(),
        }
    return {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
