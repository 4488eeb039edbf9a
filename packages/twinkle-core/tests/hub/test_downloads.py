"""Downloading from, and doing without, both hubs, by their official clients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"tokenizer.json": b"{}", "config.json": b"[]", "model.safetensors": b"x" * 1000}
DATA = {"train.jsonl": b'{"a": 1}\n', "README.md": b"# a"}

Resolve = Callable[..., Any]


def cached_by_huggingface(home: Path, folder: str, name: str) -> Path:
    """A cache as its client leaves it."""
    root = home / "hub" / folder
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return _file(root / "snapshots" / COMMIT / name).parent


def cached_by_modelscope(cache: Path, folder: str, name: str) -> Path:
    return _file(cache / folder / "snapshots" / "master" / name).parent


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("{}", encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["hf", "ms"])
def test_only_the_files_asked_for_are_downloaded_and_only_once(
    stand_in_hub: Any, resolve_apart: Resolve, scheme: str
) -> None:
    stand_in_hub.files["model", "org/name"] = MODEL
    stand_in_hub.files["dataset", "org/name"] = DATA
    environment = {"HF_ENDPOINT": stand_in_hub.url, "MODELSCOPE_ENDPOINT": stand_in_hub.url}
    id = f"{scheme}://org/name"
    calls = [[id, "model", ["*.json"]], [id, "dataset", ["*.jsonl"]], [id, "model", ["*.json"]]]
    first = resolve_apart(*calls, **environment)
    model, data, again = map(Path, first.results)
    assert sorted(path.name for path in model.iterdir() if not path.name.startswith(".")) == [
        "config.json",
        "tokenizer.json",
    ]
    assert (data / "train.jsonl").read_bytes() == DATA["train.jsonl"]
    assert again == model and model != data
    assert sorted(stand_in_hub.downloaded) == ["config.json", "tokenizer.json", "train.jsonl"]
    # The hub gone, what was downloaded is still there; and so is it when no network is wanted.
    assert resolve_apart(*calls).results == first.results
    assert resolve_apart(*calls, HF_HUB_OFFLINE="1").results == first.results


def test_a_bare_id_is_looked_for_on_one_hub_and_then_the_other(
    stand_in_hub: Any, resolve_apart: Resolve, tmp_path: Path
) -> None:
    stand_in_hub.files["model", "org/name"] = {"config.json": b"{}"}
    both = {"HF_ENDPOINT": stand_in_hub.url, "MODELSCOPE_ENDPOINT": stand_in_hub.url}
    call = ["org/name"]
    assert resolve_apart(call, **both).results[0].startswith(str(tmp_path / "hf"))
    assert resolve_apart(call, **both, TWINKLE_HUB="ms").results[0].startswith(str(tmp_path / "ms"))
    only_modelscope = {"MODELSCOPE_ENDPOINT": stand_in_hub.url}
    [path] = resolve_apart(["org/other"], call, **only_modelscope).results[1:]
    assert Path(path).is_dir()


def test_what_no_hub_has_is_not_found_with_both_answers(stand_in_hub: Any, resolve_apart: Resolve) -> None:
    both = {"HF_ENDPOINT": stand_in_hub.url, "MODELSCOPE_ENDPOINT": stand_in_hub.url}
    [result] = resolve_apart(["org/none", "dataset"], **both).results
    assert result.startswith("NotFound: dataset 'org/none' was not found. Tried:\n")
    assert "Hugging Face: no such repository, or a private one and you are not logged in" in result
    assert "ModelScope: no such repository or revision" in result


def test_caches_serve_without_a_network(resolve_apart: Resolve, tmp_path: Path) -> None:
    hf = cached_by_huggingface(tmp_path / "hf", "models--org--name", "config.json")
    ms = cached_by_modelscope(tmp_path / "ms", "models/org--name", "config.json")
    calls = [["hf://org/name"], ["ms://org/name"], ["org/name"]]
    assert resolve_apart(*calls, HF_HUB_OFFLINE="1").results == [str(hf), str(ms), str(hf)]
    assert resolve_apart(*calls).results == [str(hf), str(ms), str(hf)]


def test_without_network_and_cache_the_message_says_where_it_looked_and_what_to_do(
    resolve_apart: Resolve, tmp_path: Path
) -> None:
    calls = [["org/name"], ["ms://org/name", "dataset"], ["hf://name"]]
    bare, modelscope, huggingface = resolve_apart(*calls, TWINKLE_HUB_ROOT=str(tmp_path / "root")).results
    assert bare.startswith("NotFound: model 'org/name' was not found. Tried:\n")
    assert f"- {tmp_path}/root/org/name: not there" in bare
    assert f"- {tmp_path}/org/name: not there" in bare
    assert "- Hugging Face: can't be reached, and it has not been downloaded before" in bare
    assert "- ModelScope: can't be reached (" in bare
    assert "laid out as DIR/org/name and set TWINKLE_HUB_ROOT=DIR" in bare
    assert "Hugging Face" not in modelscope and "dataset 'ms://org/name'" in modelscope
    assert "ModelScope" not in huggingface and "DIR/name" in huggingface
    offline = resolve_apart(*calls, HF_HUB_OFFLINE="1").results
    assert "Hugging Face: offline (HF_HUB_OFFLINE)" in offline[0]
    assert "ModelScope: offline (HF_HUB_OFFLINE)" in offline[0]
