"""Our protobuf against the SDK's own descriptors: a new release that changes the wire is noticed here."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto
from tinker.proto import tinker_public_pb2

from twinkle.protocol import twinkle_pb2

THEIRS = tinker_public_pb2.DESCRIPTOR
OURS = twinkle_pb2.DESCRIPTOR

# In the SDK's file, but in no request or result that it sends or reads.
UNUSED = {"SamplingParams", "StopStrings", "StopTokens"}


def fields(message: Any) -> dict[int, tuple[str, int, int, str]]:
    """Each field's name, type, label and message or enum type, by its number."""
    written = DescriptorProto()
    message.CopyToProto(written)
    return {
        field.number: (field.name, field.type, field.label, field.type_name.rpartition(".")[2])
        for field in written.field
    }


def compare(ours: Any, theirs: Any) -> None:
    """What the SDK has, we have; older SDKs have less."""
    mine = fields(ours)
    for number, field in fields(theirs).items():
        assert mine.get(number) == field, f"{ours.full_name}, field {number}"
    for nested in theirs.nested_types:
        compare(ours.nested_types_by_name[nested.name], nested)


def test_every_message_of_the_sdk_is_ours_with_the_same_fields():
    names = set(THEIRS.message_types_by_name) - UNUSED
    assert {"ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"} <= names
    for name in sorted(names):
        assert name in OURS.message_types_by_name, f"the SDK has a new message, {name}"
        compare(OURS.message_types_by_name[name], THEIRS.message_types_by_name[name])


@pytest.mark.parametrize("name", ["DType", "StopReason"])
def test_enums_have_the_sdks_numbers(name: str):
    mine, sdk = OURS.enum_types_by_name[name], THEIRS.enum_types_by_name[name]
    assert {v.name: v.number for v in mine.values} == {v.name: v.number for v in sdk.values}
