"""What is read of a model's folder, and which file goes first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.template.tokenizer_files import read_chat_templates, read_special_tokens, read_tokenizer

Write = Callable[..., Path]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_the_jinja_file_goes_before_the_json_file_and_that_before_the_configuration(tmp_path: Path) -> None:
    assert read_chat_templates(tmp_path) == {}
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "configuration"})
    assert read_chat_templates(tmp_path) == {"default": "configuration"}
    write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
    assert read_chat_templates(tmp_path) == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja ü", encoding="utf-8")
    assert read_chat_templates(tmp_path) == {"default": "jinja ü"}


def test_named_templates_come_as_a_list_or_in_a_folder(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert read_chat_templates(tmp_path) == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("D", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R", encoding="utf-8")
    assert read_chat_templates(tmp_path) == {"default": "D", "rag": "R"}


def test_special_tokens_are_texts_objects_or_not_set(tmp_path: Path) -> None:
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "old", "unk_token": {"content": "<unk>"}})
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}
    write_json(tmp_path / "tokenizer_config.json", config)
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_special_tokens_are_those_that_transformers_gives_templates(
    tmp_path: Path, write_tiny_tokenizer: Write
) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    assert read_special_tokens(folder) == AutoTokenizer.from_pretrained(folder).special_tokens_map


def test_the_tokenizer_adds_cuts_and_pads_nothing(tmp_path: Path, write_tiny_tokenizer: Write) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(read_tokenizer(folder).encode("hello", add_special_tokens=False).ids) == 5


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no tokenizer.json.*save_pretrained"):
        read_tokenizer(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    for name, read in (("tokenizer.json", read_tokenizer), ("tokenizer_config.json", read_special_tokens)):
        (tmp_path / name).write_text("{", encoding="utf-8")
        with pytest.raises(InvalidRequest, match=name):
            read(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", [1])
    with pytest.raises(InvalidRequest, match="expected an object, got list"):
        read_chat_templates(tmp_path)
