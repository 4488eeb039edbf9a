"""What was encoded before is found again by what it was made of, and only then."""

import logging
import os
import pickle
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.data_format import NOT_TRAINED
from twinkle.dataset import Dataset
from twinkle.protocol.errors import InvalidRequest
from twinkle.template import Template

ALPACA = [{"instruction": f"question {n}", "output": "answer " * n, "id": n} for n in range(1, 6)]


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def same(first: Any, second: Any) -> bool:
    """Whether two encoded rows, or lists of them, are the same to the last type."""
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_a_template_sent_elsewhere_encodes_the_same(model: Path) -> None:
    marking = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    for template in (
        Template(model),
        Template(model, chat_template=marking, max_length=9, truncation_strategy="left"),
    ):
        sent = pickle.loads(pickle.dumps(template))
        row = {"messages": messages("question", "answer")}
        assert same(sent.encode(row), template.encode(row))
        assert sent.fingerprint == template.fingerprint


def encode_cached(
    folder: Path, model: Path, rows: Any = ALPACA, prompt: bool = False, **options: Any
) -> Dataset:
    options = {"max_length": 90, "truncation_strategy": "right", **options}
    return Dataset.from_rows(rows).set_template(Template(model, **options)).encode(prompt, cache_dir=folder)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was to be found in the cache")


@pytest.mark.parametrize("strategy", ["right", "delete"])
def test_what_was_encoded_before_is_not_encoded_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    first = encode_cached(tmp_path / "new" / "cache", model, max_length=60, truncation_strategy=strategy)
    monkeypatch.setattr(Template, "mark", refuse)
    second = encode_cached(tmp_path / "new" / "cache", model, max_length=60, truncation_strategy=strategy)
    assert same(list(first), list(second)) and 0 < len(second) <= 5
    assert first.describe() == second.describe()
    assert second.describe().truncated > 0
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".npz"]


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ALPACA[:4]},
        {"rows": ALPACA[::-1]},
        {"rows": [*ALPACA[:4], {**ALPACA[4], "output": "other"}]},
        {"rows": [*ALPACA[:4], {**ALPACA[4], "weight": 0}]},
        {"prompt": True},
        {"train_on": "all"},
        {"max_length": 91},
        {"truncation_strategy": "left"},
        {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_whatever_the_result_depends_on_is_part_of_its_name(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    encode_cached(tmp_path, model)
    with monkeypatch.context() as patched:
        patched.setattr(Template, "mark", refuse)
        encode_cached(tmp_path, model)
        with pytest.raises(InvalidRequest, match="it was to be found in the cache"):
            encode_cached(tmp_path, model, **change)


def test_the_same_model_elsewhere_is_the_same_and_another_tokenizer_is_not(
    tmp_path: Path, model: Path
) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    changed = Template(model)
    changed.tokenizer.add_tokens(["answer"])
    assert Template(copied).fingerprint == Template(model).fingerprint != changed.fingerprint


def test_a_template_class_must_tell_itself_from_others(tmp_path: Path, model: Path) -> None:
    class Own(Template):
        def encode(self, trajectory: Any, add_generation_prompt: bool = False) -> Any:
            return super().encode(trajectory, not add_generation_prompt)

    class Told(Own):
        @property
        def fingerprint(self) -> str:
            return f"Told, version 1: {super().fingerprint}"

    rows = Dataset.from_rows(ALPACA)
    with pytest.raises(InvalidRequest, match="Own has no fingerprint of its own"):
        rows.set_template(Own(model)).encode(cache_dir=tmp_path)
    rows.set_template(Told(model)).encode(cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_template_that_asks_for_the_date_is_another_one_each_day(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(days=1)

    dated = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    templates = [Template(model), Template(model, chat_template=dated)]
    before = [template.fingerprint for template in templates]
    monkeypatch.setattr("twinkle.template.template.date", Tomorrow)
    after = [template.fingerprint for template in templates]
    assert before[0] == after[0] and before[1] != after[1]


def test_the_fingerprint_is_the_same_in_every_process(model: Path) -> None:
    code = (
        "import sys; from twinkle.template import Template; "
        "print(Template(sys.argv[1], chat_template_kwargs={'a': {'b': [1, None]}}).fingerprint)"
    )
    here = Template(model, chat_template_kwargs={"a": {"b": [1, None]}}).fingerprint
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(model)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert ran.stdout.strip() == here


@pytest.mark.parametrize("damage", ["empty", "cut short", "other bytes", "other arrays"])
def test_a_damaged_file_is_made_anew_and_said(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = encode_cached(tmp_path, model)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other arrays":
        with path.open("wb") as file:
            np.savez(file, state=np.ones(5, np.uint8))
    else:
        middle = len(whole) // 2
        flipped = bytes([whole[middle] ^ 1])
        other = whole[:middle] + flipped + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "cut short": whole[:-99], "other bytes": other}[damage])
    with caplog.at_level(logging.WARNING):
        second = encode_cached(tmp_path, model)
    assert f"{path} is damaged and made anew" in caplog.text
    assert same(list(first), list(second))
    assert path.read_bytes() == whole


def test_the_cache_lies_where_the_environment_says(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_CACHE", str(tmp_path / "cache"))
    Dataset.from_rows(ALPACA).set_template(Template(model)).encode(cache_dir=True)
    assert len(list((tmp_path / "cache" / "encoded").glob("*.npz"))) == 1
    monkeypatch.delenv("TWINKLE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Dataset.from_rows(ALPACA).set_template(Template(model)).encode(cache_dir=True)
    assert len(list((tmp_path / "home" / ".cache" / "twinkle" / "encoded").glob("*.npz"))) == 1


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert len(encode_cached(tmp_path / "file" / "cache", model)) == 5
    assert "can't be written" in caplog.text


class Weighted(Template):
    """A template that weighs every other feature's tokens."""

    @property
    def fingerprint(self) -> str:
        return f"Weighted: {super().fingerprint}"

    def encode(self, trajectory: Any, add_generation_prompt: bool = False) -> Any:
        feature = super().encode(trajectory, add_generation_prompt)
        if len(feature["input_ids"]) % 2:
            feature["loss_weights"] = np.linspace(0, 1, len(feature["input_ids"]), dtype=np.float32)
        return feature


def test_weights_of_the_loss_are_kept_in_the_cache(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode() -> Dataset:
        return Dataset.from_rows(ALPACA).set_template(Weighted(model)).encode(cache_dir=tmp_path)

    first = encode()
    assert 0 < sum("loss_weights" in row for row in first) < 5
    monkeypatch.setattr(Template, "mark", refuse)
    assert same(list(first), list(encode()))


def test_pairs_are_kept_in_the_cache(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "q", "chosen": "c" * n, "rejected": "r"} for n in range(1, 4)]

    def encode() -> Dataset:
        return Dataset.from_rows(rows).set_template(Template(model)).encode_pairs(cache_dir=tmp_path)

    first = encode()
    monkeypatch.setattr(Template, "mark", refuse)
    second = encode()
    assert same(list(first), list(second))
    assert any(label != NOT_TRAINED for label in second[0]["chosen"]["labels"])
