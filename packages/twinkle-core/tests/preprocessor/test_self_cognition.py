"""Rows of swift/self-cognition become conversations with the names filled in."""

from typing import Any

import pytest

from twinkle.preprocessor import Preprocessor, SelfCognitionProcessor
from twinkle.protocol.errors import InvalidRequest

ENGLISH = {
    "query": "Who are you?",
    "response": "I am {{NAME}}, made by {{AUTHOR}}. Yes, {{NAME}}.",
    "tag": "en",
}
CHINESE = {"query": "{{NAME}}是谁?", "response": "我是{{NAME}},由{{AUTHOR}}训练。", "tag": "zh"}


def contents(row: dict[str, Any], processor: SelfCognitionProcessor) -> list[object]:
    return [message.get("content") for message in processor(row)["messages"]]


def test_the_names_are_filled_in_wherever_they_stand() -> None:
    processor = SelfCognitionProcessor("My Model", "My Team")
    assert processor(ENGLISH) == {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am My Model, made by My Team. Yes, My Model."},
        ]
    }
    assert contents(CHINESE, processor) == ["My Model是谁?", "我是My Model,由My Team训练。"]


def test_a_pair_of_names_goes_by_language() -> None:
    processor = SelfCognitionProcessor(("小明", "Ming"), ("团队", "Team"))
    assert contents(CHINESE, processor) == ["小明是谁?", "我是小明,由团队训练。"]
    assert contents(ENGLISH, processor)[1] == "I am Ming, made by Team. Yes, Ming."


def test_a_system_prompt_comes_first_when_asked_for() -> None:
    messages = SelfCognitionProcessor("A", "B", system="Be brief.")(ENGLISH)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_the_row_is_left_as_it_is() -> None:
    row = dict(ENGLISH)
    SelfCognitionProcessor("A", "B")(row)
    assert row == ENGLISH


def test_no_tag_is_needed_for_a_single_name() -> None:
    row = {key: ENGLISH[key] for key in ("query", "response")}
    assert contents(row, SelfCognitionProcessor("A", "B"))[0] == "Who are you?"
    with pytest.raises(InvalidRequest, match="tag: None; allowed are 'zh' and 'en'"):
        SelfCognitionProcessor(("A", "a"), "B")(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?"}, "query: expected text, got NoneType; the columns are question"),
        ({"query": "Who?", "response": 5, "tag": "en"}, "response: expected text, got int"),
    ],
)
def test_rows_of_other_datasets_are_refused_by_column(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SelfCognitionProcessor("A", "B")(row)


@pytest.mark.parametrize("name", [("a", "b", "c"), ("a",), (1, 2)])
def test_names_that_are_no_names_are_refused(name: Any) -> None:
    with pytest.raises(InvalidRequest, match="model_name"):
        SelfCognitionProcessor(name, "B")


def test_a_preprocessor_of_ones_own_is_a_function_of_a_row() -> None:
    class Upper(Preprocessor):
        def __call__(self, row: Any) -> dict[str, Any] | None:
            return {"text": row["text"].upper()} if row["text"] else None

    assert Upper()({"text": "a"}) == {"text": "A"}
    assert Upper()({"text": ""}) is None
