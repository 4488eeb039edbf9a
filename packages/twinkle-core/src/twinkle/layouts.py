"""One adapter under the names that different programs expect.

    peft      as a checkpoint is: PEFT on `AutoModelForCausalLM`
    serving   the names of the class that the base model's config.json names, which differ where that class holds more
              than the text model (Qwen3.5): vLLM, SGLang, and PEFT on that class
    tinker    the text model's names, and routed experts as three tensors of three dimensions (w1, w2, w3): what
              tinker-cookbook's `build_hf_model` and `build_lora_adapter` take

`convert` goes from the first to another; what it needs is recorded in adapter_model.safetensors. Owns these layouts,
and as much of the safetensors format as they take; values stay the same, bit by bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import numpy as np

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array

Layout: TypeAlias = Literal["peft", "serving", "tinker"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
SERVING_CLASS: Final = "serving_class"
"""In the metadata of WEIGHTS: the class that the base model's config.json names."""
SERVING_NAMES: Final = "serving_names"
"""Also in its metadata: pairs, as JSON, of a module's name in `AutoModelForCausalLM`'s class and in that one."""

_PREFIX = "base_model.model."
_GATE_UP, _DOWN = ".experts.base_layer.lora_", ".experts.lora_"
# Values are only moved, so a type's size is all that matters.
_OF_SIZE = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}

_Tensors: TypeAlias = dict[str, tuple[str, Array]]


def convert(source: str | Path, target: str | Path, layout: Layout) -> Path:
    """Write an adapter in another layout.

    Args:
        source: folder of a downloaded checkpoint, with adapter_config.json and adapter_model.safetensors.
        target: another folder, created if missing.

    Returns:
        The target.

    Raises:
        InvalidRequest: if the source is no such folder, or lacks what the layout needs.
    """
    check(layout)
    source, target = Path(source), Path(target)
    try:
        config = cast("dict[str, Any]", json.loads((source / CONFIG).read_text(encoding="utf-8")))
        tensors, metadata = read_tensors(source / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest(f"{source} holds no adapter in PEFT's layout ({error})") from error
    config, tensors = _MAKERS[layout](config, tensors, metadata)
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write(target / WEIGHTS, tensors)
    return target


def check(layout: str) -> None:
    """
    Raises:
        InvalidRequest: if there is no such layout.
    """
    if layout not in _MAKERS:
        raise InvalidRequest(f"layout: {layout!r} is not one of {', '.join(_MAKERS)}")


# ---------------------------------------------------------------- layouts


def _peft(config: Any, tensors: _Tensors, _metadata: Mapping[str, str]) -> tuple[Any, _Tensors]:
    return config, tensors


def _serving(config: Any, tensors: _Tensors, metadata: Mapping[str, str]) -> tuple[Any, _Tensors]:
    if SERVING_CLASS not in metadata:
        raise InvalidRequest(
            f"layout: {WEIGHTS} doesn't say how the class in the base model's config.json names its parts: the "
            "checkpoint is of an earlier server (load it and save it again), or Transformers has no such class, or "
            "that class has no text model of the kind that was trained"
        )
    pairs = cast("list[tuple[str, str]]", json.loads(metadata[SERVING_NAMES]))
    for key in ("target_modules", "target_parameters"):
        if config.get(key):
            config[key] = [renamed(name, pairs) for name in config[key]]
    return config, {
        _PREFIX + renamed(name.removeprefix(_PREFIX), pairs): tensor for name, tensor in tensors.items()
    }


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """A module's name in the class that config.json names.

    Args:
        pairs: as in SERVING_NAMES.
    """
    for ours, theirs in pairs:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def _tinker(config: Any, tensors: _Tensors, _metadata: Mapping[str, str]) -> tuple[Any, _Tensors]:
    rank = int(config["r"])
    made: _Tensors = {}
    for full_name, (kind, array) in tensors.items():
        # The cookbook inserts the missing part of the name itself, where the base model has it.
        name = full_name.replace(f"{_PREFIX}model.language_model.", f"{_PREFIX}model.")
        fused = _GATE_UP in name
        if not fused and _DOWN not in name:
            made[name] = kind, array
            continue
        where = name[: name.index(_GATE_UP if fused else _DOWN)] + ".experts"
        is_a = name.endswith("lora_A.weight")
        # PEFT: A is [experts * rank, in], B [out, rank * experts] with the experts of a rank side by side.
        if is_a:
            parts = [array.reshape(-1, rank, array.shape[1])] * (2 if fused else 1)
        else:
            whole = array.reshape(array.shape[0], rank, -1).transpose(2, 0, 1)
            parts = np.split(whole, 2, axis=1) if fused else [whole]
        for matrix, part in zip(("w1", "w3") if fused else ("w2",), parts, strict=True):
            made[f"{where}.{matrix}.lora_{'A' if is_a else 'B'}.weight"] = kind, part
    return config, made


_MAKERS: dict[Layout, Callable[[Any, _Tensors, Mapping[str, str]], tuple[Any, _Tensors]]] = {
    "peft": _peft,
    "serving": _serving,
    "tinker": _tinker,
}

# ---------------------------------------------------------------- safetensors


def read_tensors(path: Path) -> tuple[_Tensors, dict[str, str]]:
    """A file's tensors (type, and raw values) by name, and its metadata.

    Raises:
        OSError, ValueError, KeyError: if it can't be read, or is no such file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        header = cast("dict[str, Any]", json.loads(file.read(size)))
    metadata = cast("dict[str, str]", header.pop("__metadata__", {}))
    tensors: _Tensors = {}
    for name, entry in header.items():
        kind, shape = entry["dtype"], tuple(entry["shape"])
        numbers = np.memmap(
            path, _OF_SIZE[kind], "r", offset=8 + size + entry["data_offsets"][0], shape=(math.prod(shape),)
        )
        tensors[name] = kind, cast("Array", numbers.reshape(shape))
    return tensors, metadata


def _write(path: Path, tensors: _Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, array) in tensors.items():
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)
