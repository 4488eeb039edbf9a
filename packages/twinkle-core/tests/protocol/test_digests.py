from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol import twinkle_pb2 as pb
from twinkle.protocol.operations import digest
from twinkle.protocol.types import Datum, EncodedTextChunk, LoraConfig, ModelInput, OtherChunk, SamplingParams


def a_datum(tokens: list[int] | None = None, **inputs: Any) -> Datum:
    given = {"target_tokens": [2, 3], "weights": [1.0, 0.5], **inputs}
    return Datum(ModelInput.from_ints(tokens or [1, 2]), given)


PASS = m.ForwardBackwardRequest("run", 1, [a_datum(), a_datum([5, 6])], "ppo", {"clip_high_threshold": 1.25})
OTHER_PASSES = [
    replace(PASS, data=PASS.data[:1]),
    replace(PASS, data=PASS.data[::-1]),
    replace(PASS, data=[a_datum([1, 3]), PASS.data[1]]),
    replace(PASS, data=[a_datum(weights=[1.0, 0.25]), PASS.data[1]]),
    replace(PASS, data=[a_datum(advantages=[1.0, 0.5]), PASS.data[1]]),
    replace(PASS, data=[Datum(PASS.data[0].model_input, {"weights": [1.0, 0.5]}), PASS.data[1]]),
    replace(PASS, data=[a_datum(target_tokens=[[2], [3]]), PASS.data[1]]),
    replace(PASS, loss_fn="cispo"),
    replace(PASS, loss_fn_config={"clip_high_threshold": 1.5}),
    replace(PASS, loss_fn_config={}),
    replace(PASS, forward_only=True),
    replace(PASS, data=[Datum(ModelInput(chunks=[OtherChunk(type="image")]), {}), PASS.data[1]]),
]


def test_each_difference_counts():
    assert len({digest(request) for request in [PASS, *OTHER_PASSES]}) == len(OTHER_PASSES) + 1


def in_another_order(body: bytes) -> bytes:
    """The same message with its maps written from their end."""
    message = pb.ForwardBackwardRequest.FromString(body)
    for datum in message.data:
        inputs = {
            name: pb.Tensor.FromString(value.SerializeToString())
            for name, value in datum.loss_fn_inputs.items()
        }
        datum.ClearField("loss_fn_inputs")
        for name in sorted(inputs, reverse=True):
            datum.loss_fn_inputs[name].CopyFrom(inputs[name])
    return message.SerializeToString()


@pytest.mark.parametrize("sent_again", [bytes, in_another_order])
def test_a_pass_that_has_travelled_is_the_same(sent_again: Callable[[bytes], bytes]):
    body = codec.encode_forward_backward(PASS)
    assert digest(codec.decode_forward_backward(sent_again(body))) == digest(PASS)


SAMPLE = m.SampleRequest(
    sampling_session_id="s",
    seq_id=3,
    prompt=ModelInput.from_ints([1, 2]),
    sampling_params=SamplingParams(max_tokens=4, seed=1),
)
LOADED = m.LoadWeightsRequest(
    model_id="run", seq_id=1, path="tinker://a/weights/b", weights_access_token="one"
)
JSON_REQUESTS: list[Any] = [
    SAMPLE,
    LOADED,
    m.OptimStepRequest(model_id="run", seq_id=1),
    m.CreateModelRequest(
        session_id="s",
        model_seq_id=0,
        base_model="m",
        lora_config=LoraConfig(rank=4),
        user_metadata={"b": 1, "a": 2},
    ),
]


@pytest.mark.parametrize("request_", JSON_REQUESTS, ids=lambda request: type(request).__name__)
def test_a_request_in_json_that_has_travelled_is_the_same(request_: Any):
    assert digest(codec.decode_json(type(request_), codec.encode_json(request_))) == digest(request_)


def test_what_is_asked_for_counts_and_how_one_may_ask_for_it_does_not():
    assert digest(LOADED.model_copy(update={"weights_access_token": "two"})) == digest(LOADED)
    assert digest(LOADED.model_copy(update={"path": "tinker://a/weights/c"})) != digest(LOADED)
    assert digest(SAMPLE.model_copy(update={"num_samples": 2})) != digest(SAMPLE)
    longer = ModelInput(chunks=[EncodedTextChunk(tokens=[1, 2]), EncodedTextChunk(tokens=[3])])
    assert digest(SAMPLE.model_copy(update={"prompt": longer})) != digest(SAMPLE)


def test_an_unnamed_save_that_the_sdk_sends_again_is_the_same():
    first, again = (
        m.SaveWeightsForSamplerRequest(model_id="run", seq_id=3, sampling_session_seq_id=number)
        for number in (0, 1)
    )
    assert digest(first) == digest(again)
    assert digest(first.model_copy(update={"path": "named"})) != digest(first)


def test_a_later_version_that_knows_more_fields_finds_the_same():
    class Later(m.OptimStepRequest):
        more: int | None = None

    step = m.OptimStepRequest(model_id="run", seq_id=1)
    assert digest(Later(model_id="run", seq_id=1)) == digest(step)
    assert digest(Later(model_id="run", seq_id=1, more=1)) != digest(step)


# What the first version that noted digests made of these requests: they stand in journals.
WRITTEN = {
    "ForwardBackwardRequest": "e2ca7024d21b9428b682f0b2863409da",
    "SampleRequest": "94ea639aa8cd2f741ade394f96fa6177",
    "LoadWeightsRequest": "5ac48a0f914b8b2a82abb8d849c0c31e",
    "OptimStepRequest": "d24e5d7b3a9956aa8a4025e846d87528",
    "CreateModelRequest": "34494db83005cf6a7d220383a39fa72a",
}


def test_a_request_accepted_by_an_earlier_version_is_known_again():
    assert {type(request).__name__: digest(request).hex() for request in [PASS, *JSON_REQUESTS]} == WRITTEN
