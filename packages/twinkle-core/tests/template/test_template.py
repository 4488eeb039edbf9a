"""The template as datasets and scripts use it: ids, labels, limits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.data_format import NOT_TRAINED, Message, Trajectory
from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.template import SequenceTooLong, Template, get_template_class, register_template

TWO_TURNS = Trajectory(
    messages=[
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
        Message(role="assistant", content="dé"),
    ]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[..., Path]) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("hub") / "org" / "name")


def trained(template: Template, trajectory: Trajectory = TWO_TURNS) -> str:
    labels = template.encode(trajectory)["labels"]
    return template.decode(labels[labels != NOT_TRAINED])


def test_a_prompt_is_int64_ids_that_end_with_the_opening_of_a_turn(model: Path) -> None:
    template = Template(model_id=str(model))
    trajectory = Trajectory(
        messages=[
            Message(role="system", content="You are a helpful assistant"),
            Message(role="user", content="Who are you?"),
        ]
    )
    feature = template.encode(trajectory, add_generation_prompt=True)
    assert feature["input_ids"].dtype == feature["labels"].dtype == np.int64
    assert isinstance(feature["input_ids"].tolist()[0], int)
    assert template.decode(feature["input_ids"]).endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
    assert template.decode(feature["input_ids"]) == template.render(trajectory, add_generation_prompt=True)
    assert set(feature["labels"].tolist()) == {NOT_TRAINED}


def test_labels_are_the_assistants_turns_unless_told_otherwise(model: Path) -> None:
    assert trained(Template(model)) == "b<|im_end|>dé<|im_end|>"
    assert trained(Template(model, train_on="last_assistant")) == "dé<|im_end|>"
    everything = Template(model, train_on="all")
    assert trained(everything) == everything.render(TWO_TURNS)


def test_labels_are_the_tokens_own_ids(model: Path) -> None:
    feature = Template(model).encode(TWO_TURNS)
    kept = feature["labels"] != NOT_TRAINED
    assert (feature["labels"][kept] == feature["input_ids"][kept]).all()


def test_a_character_of_several_tokens_is_trained_on_whole(model: Path) -> None:
    messages = [Message(role="user", content="a"), Message(role="assistant", content="😀")]
    labels = Template(model).encode(Trajectory(messages=messages))["labels"]
    assert (labels != NOT_TRAINED).sum() == len("😀".encode()) + 1


MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}<|im_end|>{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_marks_of_the_chat_template_go_before_what_is_found(model: Path) -> None:
    assert trained(Template(model, chat_template=MARKED)) == "bdé"
    assert trained(Template(model, chat_template=MARKED, train_on="last_assistant")) == "dé"


def test_conversations_without_an_assistant_train_nothing(model: Path) -> None:
    trajectory = Trajectory(messages=[Message(role="user", content="a")])
    for train_on in ("assistant", "last_assistant"):
        labels = Template(model, train_on=train_on).encode(trajectory)["labels"]
        assert (labels == NOT_TRAINED).all()


def test_long_sequences_are_an_error_unless_told_otherwise(model: Path) -> None:
    with pytest.raises(SequenceTooLong, match="max_length is 10; raise it, or set truncation_strategy"):
        Template(model, max_length=10).encode(TWO_TURNS)


@pytest.mark.parametrize(("strategy", "kept"), [("left", slice(-10, None)), ("right", slice(10))])
def test_truncation_cuts_ids_and_labels_alike(model: Path, strategy: Any, kept: slice) -> None:
    whole = Template(model).encode(TWO_TURNS)
    cut = Template(model, max_length=10, truncation_strategy=strategy).encode(TWO_TURNS)
    assert cut["input_ids"].tolist() == whole["input_ids"][kept].tolist()
    assert cut["labels"].tolist() == whole["labels"][kept].tolist()


def test_a_sequence_of_just_the_allowed_length_is_left_whole(model: Path) -> None:
    length = len(Template(model).encode(TWO_TURNS)["input_ids"])
    assert len(Template(model, max_length=length).encode(TWO_TURNS)["input_ids"]) == length


def test_delete_leaves_long_ones_out_of_a_batch(model: Path) -> None:
    short = Trajectory(messages=[Message(role="user", content="a")])
    deleting = Template(model, max_length=20, truncation_strategy="delete")
    assert len(deleting.batch_encode([short, TWO_TURNS, short])) == 2
    with pytest.raises(SequenceTooLong):
        deleting.encode(TWO_TURNS)
    with pytest.raises(SequenceTooLong):
        Template(model, max_length=20).batch_encode([short, TWO_TURNS])


def test_decode_takes_lists_and_arrays_and_can_skip_special_tokens(model: Path) -> None:
    template = Template(model)
    ids = template.tokenizer.encode("héllo<|im_end|>", add_special_tokens=False).ids
    for tokens in (ids, np.array(ids), np.array(ids, np.int32)):
        assert template.decode(tokens) == "héllo<|im_end|>"
        assert template.decode(tokens, skip_special_tokens=True) == "héllo"
    assert template.decode([]) == ""


def test_variables_reach_the_chat_template(model: Path) -> None:
    source = "{{ bos_token }}{{ mood }}{{ messages[0].content }}"
    template = Template(model, chat_template=source, chat_template_kwargs={"mood": "calm "})
    assert template.render({"messages": [{"role": "user", "content": "x"}]}) == "<|im_start|>calm x"


def test_an_id_is_found_below_the_hub_root(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(model.parent.parent))
    assert Template(model_id="ms://org/name").model_id == "ms://org/name"
    with pytest.raises(NotFound):
        Template(Path("org/name"))  # a path is a path


def test_a_model_without_chat_template_says_what_to_do(
    tmp_path: Path, write_tiny_tokenizer: Callable[..., Path]
) -> None:
    folder = write_tiny_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(InvalidRequest, match="no chat template .*pass one as chat_template="):
        Template(folder)
    assert Template(folder, chat_template="x").render(TWO_TURNS) == "x"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "user"}, "train_on: 'user'; allowed are assistant, last_assistant, all"),
        (
            {"truncation_strategy": "cut"},
            "truncation_strategy: 'cut'; allowed are raise, left, right, delete",
        ),
        ({"max_length": 0}, "max_length: 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Template(model, **options)


def test_templates_are_known_by_name(model: Path) -> None:
    class Shouting(Template):
        pass

    assert get_template_class("Template") is Template
    register_template("Shouting", Shouting)
    assert get_template_class("Shouting") is Shouting
    with pytest.raises(InvalidRequest, match="'Qwen' is unknown; known are .*Template"):
        get_template_class("Qwen")
