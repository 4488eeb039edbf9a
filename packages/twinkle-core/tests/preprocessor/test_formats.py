"""Every usual layout of a row becomes messages, and what is none of them is named."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.preprocessor import ConversationProcessor, PreferenceProcessor
from twinkle.protocol.errors import InvalidRequest

U, A, S = (
    lambda text: {"role": "user", "content": text},
    lambda text: {"role": "assistant", "content": text},
    lambda text: {"role": "system", "content": text},
)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [U("q"), A("a")]}, [U("q"), A("a")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U("q"), A("a")]),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [U("q"), A("a")]),
        (
            {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": "s"},
            [S("s"), U("q"), A("a")],
        ),
        (
            {"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "q"}], "system": "s"},
            [S("own"), U("q")],
        ),
        ({"instruction": "i", "output": "o"}, [U("i"), A("o")]),
        ({"instruction": "i", "input": "x", "output": "o", "system": "s"}, [S("s"), U("i\nx"), A("o")]),
        ({"instruction": "i", "input": "", "output": "o", "system": None}, [U("i"), A("o")]),
        ({"instruction": "", "input": "x", "output": "o"}, [U("x"), A("o")]),
        (
            {"instruction": "i", "output": "o", "history": [["q1", "a1"], ("q2", "a2")]},
            [U("q1"), A("a1"), U("q2"), A("a2"), U("i"), A("o")],
        ),
        ({"prompt": "p", "completion": "c"}, [U("p"), A("c")]),
        ({"prompt": [S("s"), U("p")], "completion": [A("c")]}, [S("s"), U("p"), A("c")]),
        ({"prompt": "p", "response": "r"}, [U("p"), A("r")]),
        ({"question": "q", "answer": "a"}, [U("q"), A("a")]),
        (
            {"query": "q", "response": "r", "system": "s", "history": [["h", "k"]]},
            [S("s"), U("h"), A("k"), U("q"), A("r")],
        ),
        # Columnar files give every row all columns.
        ({"messages": None, "conversations": None, "query": "q", "response": "r", "history": None}, [U("q"), A("r")]),
        ({"chosen": None, "rejected": None, "query": "q", "response": "r"}, [U("q"), A("r")]),
    ],
)  # fmt: skip
def test_a_usual_layout_becomes_messages(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    before = json.dumps(row)
    assert ConversationProcessor()(row)["messages"] == messages
    assert json.dumps(row) == before


def test_columns_that_are_not_read_stay_and_those_that_are_go() -> None:
    tools = [{"type": "function"}]
    row = {"query": "q", "response": "r", "system": "s", "history": [], "tools": tools, "id": 7, "input": "i"}
    assert ConversationProcessor()(row) == {
        "messages": [S("s"), U("q"), A("r")],
        "tools": tools,
        "id": 7,
        "input": "i",
    }
    assert ConversationProcessor()({"messages": [U("q")], "system": "s"}) == {
        "messages": [U("q")],
        "system": "s",
    }


def test_function_calls_and_what_they_gave_become_tool_messages() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "a", "weight": 0},
        ]
    }
    assert ConversationProcessor()(row)["messages"] == [
        U("q"),
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "sun"},
        {**A("a"), "weight": 0},
    ]


def test_lists_from_columnar_files_are_arrays() -> None:
    turns = np.array([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], dtype=object)
    assert ConversationProcessor()({"conversations": turns})["messages"] == [U("q"), A("a")]
    history = np.array([np.array(["h", "k"], dtype=object)], dtype=object)
    assert (
        ConversationProcessor()({"query": "q", "response": "r", "history": history})["messages"][1]["content"]
        == "k"
    )


@given(st.lists(st.tuples(st.sampled_from(["human", "gpt"]), st.text()), min_size=1))
def test_sharegpt_keeps_every_word_in_order(turns: list[tuple[str, str]]) -> None:
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    messages = ConversationProcessor()(row)["messages"]
    names = {"user": "human", "assistant": "gpt"}
    assert [(names[message["role"]], message["content"]) for message in messages] == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "id": 1}, "columns are text, id: .*Known .*messages; conversations.*query, response"),
        ({}, "columns are none"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preferences.*encode_pairs.*PreferenceProcessor"),
        ({"chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]}, "preferences"),
        ({"conversations": []}, "^conversations: expected a list of turns, got an empty list"),
        ({"conversations": "q"}, "^conversations: expected a list of turns, got str"),
        ({"conversations": ["q"]}, r"^conversations\[0\]: expected an object .*got str"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2 + [{"from": "gpt", "value": 5}]},
         r"^conversations\[2\].value: expected text, got int"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, r"^conversations\[0\].from: 'alien'; known are .*human"),
        ({"conversations": [{"value": "q"}]}, r"^conversations\[0\].from is missing; a turn has from and value"),
        ({"conversations": [{"from": "human"}]}, r"^conversations\[0\].value is missing; a turn has from and value"),
        ({"conversations": [{"from": "function_call"}]}, r"^conversations\[0\].value is missing"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"^conversations\[0\].value: expected text, got nothing"),
        ({"conversations": [{"role": "user", "content": 5}]}, r"^conversations\[0\].content: expected text, got int"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, r"\[0\].value: expected the call as JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, r"\[0\].value.name: expected text"),
        ({"conversations": [{"from": "human", "value": "q"}], "system": 5}, "^system: expected text, got int"),
        ({"instruction": "i", "output": None}, "^output: expected text, got nothing"),
        ({"instruction": "i", "output": "o", "input": 5}, "^input: expected text, got int"),
        ({"question": "q", "answer": 42}, "^answer: expected text, got int"),
        ({"query": "q", "response": "r", "history": "h"}, "^history: expected a list of .*got str"),
        ({"query": "q", "response": "r", "history": [["a"]]}, r"^history\[0\]: expected .*got a list of 1"),
        ({"query": "q", "response": "r", "history": [["a", "b"], ["c", 1]]}, r"^history\[1\]\[1\]: expected text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ConversationProcessor()(row)


GOOD, BAD = [U("q"), A("good")], [U("q"), A("bad")]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, GOOD, BAD),
        ({"prompt": [U("q")], "chosen": [A("good")], "rejected": [A("bad")]}, GOOD, BAD),
        ({"prompt": [U("q")], "chosen": "good", "rejected": "bad"}, GOOD, BAD),
        ({"chosen": GOOD, "rejected": BAD}, GOOD, BAD),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, GOOD, BAD),
        (
            {"question": "q", "system": "s", "history": [["h", "k"]], "chosen": "good", "rejected": "bad"},
            [S("s"), U("h"), A("k"), *GOOD],
            [S("s"), U("h"), A("k"), *BAD],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            GOOD,
            BAD,
        ),
    ],
)
def test_preferences_become_two_conversations(row: dict[str, Any], chosen: Any, rejected: Any) -> None:
    pair = PreferenceProcessor()({**row, "id": 3})
    assert pair == {"id": 3, "chosen": chosen, "rejected": rejected}
    assert PreferenceProcessor()(pair) == pair


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "c"}, "^rejected: nothing there; .*columns are prompt, chosen"),
        ({"chosen": "c", "rejected": "r"}, "^chosen: an answer without its question"),
        ({"chosen": [A("c")], "rejected": [A("r")]}, "^chosen: begins with the answer"),
        ({"prompt": "q", "chosen": "c", "rejected": 5}, "^rejected: expected text or a list of messages, got int"),
        ({"prompt": 5, "chosen": "c", "rejected": "r"}, "^prompt: expected text, got int"),
        ({"chosen": GOOD, "rejected": [*BAD, U("?")]}, "^rejected: the last message is the user's"),
        ({"chosen": GOOD, "rejected": [U("q"), 5]}, r"^rejected\[1\]: expected an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pair_is_named_by_its_side(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PreferenceProcessor()(row)
