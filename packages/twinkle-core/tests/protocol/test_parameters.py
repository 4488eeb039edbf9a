"""Values that people write are checked at once; those that were received may hold what we don't know yet."""

from typing import Any

import pytest

from twinkle.protocol import messages as m
from twinkle.protocol.codec import decode_json
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import AdamParams, LoraConfig, SamplingParams


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            SamplingParams,
            {"max_token": 4},
            "SamplingParams: there is no 'max_token'; did you mean 'max_tokens'?",
        ),
        (
            SamplingParams,
            {"max_tokens": 0},
            "SamplingParams: max_tokens: .* greater than or equal to 1 .got '0'.",
        ),
        (SamplingParams, {"temperature": -1.0}, "SamplingParams: temperature"),
        (AdamParams, {"lr": 1e-4}, "AdamParams: there is no 'lr'"),
        (AdamParams, {"beta1": 1.0}, "AdamParams: beta1"),
        (LoraConfig, {"rank": "many"}, "LoraConfig: rank: .* valid integer"),
    ],
)
def test_a_mistake_is_said(kind: type[Any], given: dict[str, Any], message: str):
    with pytest.raises(InvalidRequest, match=message):
        kind(**given)


def test_unknown_fields_on_the_wire_are_passed_over_and_wrong_ones_named():
    start = b'{"sampling_session_id": "s", "prompt": {"chunks": []}, "num_samples": 1, "seq_id": 0, '
    newer = decode_json(m.SampleRequest, start + b'"sampling_params": {"max_tokens": 3, "of_tomorrow": 1}}')
    assert newer.sampling_params == SamplingParams(max_tokens=3)
    with pytest.raises(InvalidRequest, match="^sampling_params.max_tokens: "):
        decode_json(m.SampleRequest, start + b'"sampling_params": {"max_tokens": 0}}')
