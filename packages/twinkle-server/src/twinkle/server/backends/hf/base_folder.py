"""Checks that a directory holds a complete base model, before any weight is read. No torch.

With missing or unused tensors the server would serve another model than the one it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from twinkle.protocol.errors import InvalidRequest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_AGAIN = "download the model again, all of its files"
_LFS = b"version https://git-lfs"
# Keys of config.json that describe quantisation, and files of their own in which older tools describe it.
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_QUANTISATION_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_NARROW_DTYPES = ("F8_", "F6_", "F4")


def check(path: Path, can_dequantise: Collection[str] = ()) -> dict[str, Path]:
    """Check all files of a model.

    Args:
        can_dequantise: quantisation methods whose weights can be dequantised on loading.

    Returns:
        The file of each tensor.

    Raises:
        InvalidRequest: with the file or tensor at fault, or the quantisation method.
    """
    config = _read_json(path / "config.json", _no_config(path))
    if (path / "adapter_config.json").is_file():
        raise InvalidRequest(
            f"model: {path} holds an adapter (adapter_config.json) beside, or instead of, a base model; give the base "
            "model's own directory, or one with the adapter merged into it, without that file"
        )
    method = quantised_by(path, config)
    if method is not None and method not in can_dequantise:
        raise InvalidRequest(_quantised(path, method))
    files = tensor_files(path)
    if method is None:
        _check_dtypes(path, files)
    return files


def quantised_by(path: Path, config: Mapping[str, Any] | None = None) -> str | None:
    """The quantisation method that the directory declares, or None.

    Args:
        config: `config.json`, if already read.
    """
    if config is None:
        config = _read_json(path / "config.json", _no_config(path))
    parts = cast("list[Mapping[str, Any]]", [part for part in config.values() if isinstance(part, dict)])
    for text in (config, *parts):
        for key in _QUANTISATION_KEYS:
            found = text.get(key)
            if isinstance(found, dict):
                found = cast("dict[str, Any]", found)
                by_bits = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else None
                return str(found.get("quant_method") or by_bits or "an unnamed method")
    return next((method for name, method in _QUANTISATION_FILES.items() if (path / name).is_file()), None)


def tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor: `model.safetensors`, or as the index says.

    Raises:
        InvalidRequest: if a file is missing or unreadable, or lacks a tensor of the index.
    """
    if (path / WEIGHTS).is_file():
        return dict.fromkeys(_names(path / WEIGHTS), path / WEIGHTS)
    if not (path / INDEX).is_file():
        found = sorted(file.name for file in path.glob("*.safetensors"))
        shown = f"only {', '.join(found[:3])}, and no index" if found else "no safetensors"
        raise InvalidRequest(
            f"model: {path} holds neither {WEIGHTS} nor {INDEX} ({shown}); {_AGAIN}, or save the model in that format"
        )
    placed = _read_json(path / INDEX, f"{path / INDEX} can't be read").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InvalidRequest(
            f"model: {path / INDEX} has no weight_map, which says where tensors are; {_AGAIN}"
        )
    file_of = {name: path / str(file) for name, file in cast("dict[str, object]", placed).items()}
    held = {file: set(_names(file)) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in held[file]:
            raise InvalidRequest(
                f"model: {file} lacks the tensor {name}, which {INDEX} says is in it; {_AGAIN}"
            )
    return file_of


def check_layers(path: Path, names: Iterable[str], layers: str, count: int) -> None:
    """
    Args:
        names: of the unused tensors, or of all.
        layers: name of the list of decoder layers.
        count: number of layers in `config.json`.

    Raises:
        InvalidRequest: if there are weights for more layers.
    """
    pattern = re.compile(re.escape(layers) + r"\.(\d+)\.")
    for name in sorted(names):
        match = pattern.match(name.replace("language_model.", ""))
        if match is not None and int(match[1]) >= count:
            raise InvalidRequest(
                f"model: {path} holds {name}, but by config.json there are {count} layers, 0 to {count - 1}; the "
                f"weights and config.json don't belong together: {_AGAIN}, or set num_hidden_layers"
            )


def missing(path: Path, names: Iterable[str], architecture: str) -> InvalidRequest:
    """The error for tensors that no file has."""
    return InvalidRequest(
        f"model: {path} is not whole: no file in it holds {_shown(names)}, of which {architecture} is made by its "
        f"config.json; {_AGAIN}, config.json with them"
    )


def not_finite(path: Path, name: str) -> InvalidRequest:
    """The error for a weight that is infinite or NaN."""
    return InvalidRequest(
        f"model: the weight {name} in {path} holds numbers that are not finite (NaN or infinity); {_AGAIN}, or load it "
        "in the type that it was saved in"
    )


def _shown(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more tensors" if len(found) > 3 else "")


def _no_config(path: Path) -> str:
    return (
        f"{path} is not a model directory: it has no config.json that can be read; "
        "give a directory with config.json and safetensors"
    )


def _quantised(path: Path, method: str) -> str:
    return (
        f"model: the weights in {path} are quantised ({method}), which can't be trained on here; give the model's "
        "original in bfloat16 or float32, or dequantise it (Transformers: model.dequantize(), then save_pretrained)"
    )


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = _not_downloaded(path) or str(error)
        raise InvalidRequest(f"model: {otherwise} ({reason})") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"model: {path} is no JSON object; {_AGAIN}")
    return cast("dict[str, Any]", found)


def _names(file: Path) -> list[str]:
    try:
        with cast("Any", safe_open)(file, framework="numpy") as opened:
            return cast("list[str]", list(opened.keys()))
    except (OSError, SafetensorError) as error:
        reason = "it is missing" if not file.is_file() else _not_downloaded(file)
        cut_off = f"it is cut off or damaged: {error}"
        raise InvalidRequest(f"model: {file} can't be read ({reason or cut_off}); {_AGAIN}") from error


def _not_downloaded(file: Path) -> str | None:
    """A reason why a file can't be parsed, if its first bytes show one."""
    try:
        with file.open("rb") as opened:
            beginning = opened.read(len(_LFS))
    except OSError:
        return None
    if not beginning:
        return "it is empty"
    return "it is a Git LFS pointer, not the file itself: git lfs pull gets it" if beginning == _LFS else None


def _check_dtypes(path: Path, files: Mapping[str, Path]) -> None:
    """Types of 8 bits or fewer mean quantised weights, even if the configuration doesn't say so."""
    for file in sorted(set(files.values())):
        with cast("Any", safe_open)(file, framework="numpy") as opened:
            for name in cast("list[str]", opened.keys()):
                dtype = str(opened.get_slice(name).get_dtype())
                if dtype.startswith(_NARROW_DTYPES):
                    raise InvalidRequest(_quantised(path, f"{name} is {dtype}"))
