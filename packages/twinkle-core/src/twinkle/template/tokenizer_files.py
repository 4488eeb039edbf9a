"""Reads what a template needs from a model's folder: tokenizer, chat templates, special tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest, NotFound

TEMPLATE_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""The files to download from a hub; all but the first are optional."""

# Those that Transformers passes to chat templates (`PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES`).
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without added special tokens, truncation or padding.

    Raises:
        NotFound: if there is no tokenizer.json.
        InvalidRequest: if it can't be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFound(
            f"{folder} has no tokenizer.json; a model with only an older tokenizer format can be converted with "
            "Transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        raise InvalidRequest(f"{path} can't be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The post-processor only adds special tokens, which the chat template writes itself, and trims offsets, which
    # labels need untrimmed.
    cast(Any, tokenizer).post_processor = None
    return tokenizer


def read_chat_templates(folder: Path) -> dict[str, str]:
    """The folder's chat templates by name, usually just "default"; empty if it has none.

    `chat_template.jinja` takes precedence over `chat_template.json`, and that over the field of
    `tokenizer_config.json`, which is a template or a list of `{name, template}`.
    """
    templates = {
        path.stem: path.read_text("utf-8") for path in folder.glob("additional_chat_templates/*.jinja")
    }
    main = folder / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text("utf-8")
    if templates:
        return templates
    for name in ("chat_template.json", "tokenizer_config.json"):
        field = _read_object(folder / name).get("chat_template")
        if isinstance(field, str):
            return {"default": field}
        if isinstance(field, list):
            named = cast(list[Mapping[str, str]], field)
            return {each["name"]: each["template"] for each in named}
    return {}


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The text of each special token, by its name in chat templates, such as `bos_token`."""
    config = {
        **_read_object(folder / "special_tokens_map.json"),
        **_read_object(folder / "tokenizer_config.json"),
    }
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value: object = config.get(name)
        if isinstance(value, dict):
            value = cast(dict[str, object], value).get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path}: expected an object, got {type(value).__name__}")
    return cast(dict[str, Any], value)
