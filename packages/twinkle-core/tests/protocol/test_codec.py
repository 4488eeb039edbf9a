"""The codec against the Tinker SDK's own generated messages, and against damaged bytes."""

import math

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto import response_conv
from tinker.proto import tinker_public_pb2 as sdk_pb

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.errors import InvalidRequest, TooLarge, TwinkleError
from twinkle.protocol.results import with_plain_rows
from twinkle.protocol.types import (
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkRow,
    TopkTable,
)


def a_pass() -> m.ForwardBackwardRequest:
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [0.5, -1.0, 0.0]})
    return m.ForwardBackwardRequest(
        "s:train:0", 7, [datum], "ppo", {"clip": 0.2, "id": "x"}, forward_only=True
    )


def test_numbers_that_are_not_finite_are_json_that_the_sdk_reads():
    """As the SDK reads it: orjson, which is strict, and its own model."""
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    body = codec.encode_json(m.OptimStepResponse(metrics=values))
    for read in (
        types.OptimStepResponse.model_validate(orjson.loads(body)),
        codec.decode_json(m.OptimStepResponse, body),
    ):
        assert read.metrics is not None
        np.testing.assert_equal(read.metrics, values)
    anything = m.CreateSessionRequest(user_metadata={"a": math.nan, "b": [{"c": math.inf}]})
    orjson.loads(codec.encode_json(anything))


def describe(descriptor) -> dict:
    """Every message, field, number, type and label below a file descriptor, without the package's name."""

    def short(name: str) -> str:
        return name.split(".", 2)[-1] if name else ""

    def fields(message) -> dict:
        return {
            field.name: (
                field.number,
                field.type,
                field.is_repeated,
                short(field.message_type.full_name) if field.message_type else "",
                field.containing_oneof.name
                if field.containing_oneof and not field.containing_oneof.name.startswith("_")
                else None,
            )
            for field in message.fields
        }

    messages = {name: fields(message) for name, message in descriptor.message_types_by_name.items()}
    enums = {
        name: [(value.name, value.number) for value in enum.values]
        for name, enum in descriptor.enum_types_by_name.items()
    }
    return {"messages": messages, "enums": enums}


def numbers_only(described: dict) -> dict:
    """Names of oneofs don't travel; everything else does."""
    return {
        name: {field: facts[:3] for field, facts in fields.items()}
        for name, fields in described["messages"].items()
    }


def test_field_numbers_and_types_equal_the_sdks():
    ours, theirs = describe(pb.DESCRIPTOR), describe(sdk_pb.DESCRIPTOR)
    assert ours["enums"] == theirs["enums"]
    our_messages, their_messages = numbers_only(ours), numbers_only(theirs)
    # SamplingParams and its parts are declared by the SDK but sent by nothing: samples are JSON.
    unused = {"SamplingParams", "StopStrings", "StopTokens"}
    # What isn't Tinker's (see `protocol.operations`) has other names than anything that is.
    own = {"Operation", "OperationsRequest", "OperationReply", "OperationsReply"}
    assert not own & their_messages.keys()
    assert {name: their_messages[name] for name in their_messages if name not in unused} == {
        name: our_messages[name] for name in our_messages if name not in own
    }


def test_the_sdks_messages_read_our_training_pass():
    theirs = sdk_pb.ForwardBackwardRequest.FromString(codec.encode_forward_backward(a_pass()))
    assert (theirs.model_id, theirs.seq_id, theirs.loss_fn, theirs.forward_only) == (
        "s:train:0",
        7,
        "ppo",
        True,
    )
    assert np.frombuffer(theirs.data[0].model_input[0].encoded_text.tokens, "<i4").tolist() == [1, 2, 3]
    weights = theirs.data[0].loss_fn_inputs["weights"]
    assert np.frombuffer(weights.dense, "<f4").tolist() == [0.5, -1.0, 0.0]
    assert list(weights.shape) == [3]
    assert theirs.loss_fn_config_v2["clip"].number == 0.2
    assert theirs.loss_fn_config_v2["id"].text == "x"


def test_a_training_pass_survives_the_wire():
    back = codec.decode_forward_backward(codec.encode_forward_backward(a_pass()))
    assert back.loss_fn_config == {"clip": 0.2, "id": "x"}
    assert back.data[0].model_input.to_ints() == [1, 2, 3]
    assert back.data[0].loss_fn_inputs["target_tokens"].array.dtype == np.int64
    np.testing.assert_array_equal(
        back.data[0].loss_fn_inputs["weights"].array, np.array([0.5, -1, 0], np.float32)
    )


def test_a_sparse_tensor_becomes_the_dense_one_it_stands_for():
    dense = np.array([[0, 5, 0], [0, 0, 0], [7, 0, 9]], np.int64)
    rows, cols = np.nonzero(dense)
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, data=[pb.Datum()])
    tensor = message.data[0].loss_fn_inputs["target_tokens"]
    tensor.sparse_csr.values = dense[rows, cols].astype("<i8").tobytes()
    tensor.sparse_csr.crow_indices = np.array([0, 1, 1, 3], "<i8").tobytes()
    tensor.sparse_csr.col_indices = cols.astype("<i8").tobytes()
    tensor.dtype = pb.DTYPE_INT64
    tensor.shape.extend([3, 3])
    decoded = codec.decode_forward_backward(message.SerializeToString())
    np.testing.assert_array_equal(decoded.data[0].loss_fn_inputs["target_tokens"].array, dense)


def test_ragged_outputs_keep_their_order_and_shapes():
    rows = [{"logprobs": TensorData(np.arange(n, dtype=np.float32))} for n in (3, 1, 4)]
    rows.append({"logprobs": TensorData(np.ones((2, 5), np.float32))})
    back = codec.decode_forward_backward_output(
        codec.encode_forward_backward_output(ForwardBackwardOutput(rows, {"loss:sum": 1.5}))
    )
    assert [row["logprobs"].shape for row in back.loss_fn_outputs] == [[3], [1], [4], [2, 5]]
    np.testing.assert_array_equal(back.loss_fn_outputs[2]["logprobs"].array, np.arange(4))
    assert back.metrics == {"loss:sum": 1.5}


def test_the_sdk_reads_our_results():
    rows = [{"logprobs": TensorData(np.array(values, np.float32))} for values in ([-1, -2], [-3])]
    output = ForwardBackwardOutput(rows, {"loss:sum": 6.0})
    converted = response_conv.deserialize_forward_backward_output(
        codec.encode_forward_backward_output(output)
    )
    assert [row["logprobs"].tolist() for row in converted.loss_fn_outputs] == [[-1, -2], [-3]]
    assert converted.metrics == {"loss:sum": 6.0}


def test_a_sample_survives_the_wire():
    sample = SampleResponse(
        [SampledSequence("stop", [5, 6], [-0.5, -1.5], [[(5, -0.5), (1, -2.0)], None])],
        prompt_logprobs=[None, -0.25],
        topk_prompt_logprobs=[None, [(9, -0.25)]],
    )
    back = codec.decode_sample(codec.encode_sample(sample))
    assert back.sequences[0].tokens == [5, 6]
    assert back.sequences[0].logprobs == [-0.5, -1.5]
    assert back.sequences[0].topk_logprobs == [[(5, -0.5), (1, -2.0)], None]
    assert back.prompt_logprobs == [None, -0.25]
    assert back.topk_prompt_logprobs == [None, [(9, -0.25)]]


def test_json_errors_name_the_field():
    with pytest.raises(InvalidRequest, match=r"sampling_params\.temperature: .*greater than or equal to 0"):
        codec.decode_json(
            m.SampleRequest,
            b'{"sampling_session_id":"s","seq_id":0,"prompt":{"chunks":[]},"sampling_params":{"temperature":-1}}',
        )


def test_a_shape_that_its_bytes_do_not_fill_is_refused():
    message = pb.ForwardBackwardRequest(data=[pb.Datum()])
    tensor = message.data[0].loss_fn_inputs["weights"]
    tensor.dense, tensor.dtype = b"\0" * 8, pb.DTYPE_FLOAT32
    tensor.shape.extend([2**40, 2**40])
    with pytest.raises(InvalidRequest, match=r"data\[0\]\.loss_fn_inputs\.weights: shape"):
        codec.decode_forward_backward(message.SerializeToString())


def test_a_zstd_bomb_is_refused_before_it_unfolds():
    bomb = codec.compress(b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    with pytest.raises(TooLarge):
        codec.decompress(bomb, max_bytes=1_000_000)


@given(st.binary(max_size=300), st.integers(0, 120), st.integers(0, 255))
def test_damaged_bytes_are_refused_with_our_own_errors_or_read(noise: bytes, at: int, value: int):
    damaged = bytearray(codec.encode_forward_backward(a_pass()))
    damaged[at % len(damaged)] = value
    for body in (noise, bytes(damaged)):
        try:
            codec.decode_forward_backward(body)
        except TwinkleError as error:
            assert error.status == 400


def test_a_table_is_the_list_of_its_rows():
    rows: list[TopkRow] = [None, [(9, -0.25)], [(5, -0.5), (1, -2.0)]]
    table = TopkTable.of(rows)
    assert table == rows and rows == table and table != rows[1:]
    assert [*table] == rows and table[1:] == rows[1:] and table[-1] == rows[-1] and len(table) == 3
    assert table.token_ids.tolist() == [[0, 0], [9, 0], [5, 1]]
    assert TopkTable.of(table) is table and TopkTable.of([]) == []
    assert TopkTable.joined([table, TopkTable.empty(2, 2)]) == [*rows, None, None]
    with pytest.raises(IndexError):
        table[3]


def test_clients_are_given_plain_rows():
    rows: list[TopkRow] = [None, [(9, -0.25)]]
    table = TopkTable.of(rows)
    response = SampleResponse([SampledSequence("stop", [9], None, table)], topk_prompt_logprobs=table)
    for plain in (codec.decode_sample(codec.encode_sample(response)), with_plain_rows(response)):
        for table in (plain.topk_prompt_logprobs, plain.sequences[0].topk_logprobs):
            assert type(table) is list and table == rows
