"""An adapter added to its base model's weights: `twinkle checkpoints merge`.

The result is the base model as it was published, with the same files, names and types; only the matrices that the
adapter acts on differ, W + (alpha / rank) B A. One tensor at a time is in memory. If the output head is the embedding
(`tie_word_embeddings`) and the adapter acts on the head, the head gets a matrix of its own, so that the embedding stays
as it is. No torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from twinkle import layouts
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.types import Array, Float32Array

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_HEAD = "lm_head"
_EMBEDDING = ".embed_tokens.weight"
_PREFIX = "base_model.model."
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def merge(base: str | Path, adapter: str | Path, target: str | Path) -> Path:
    """Write the base model with an adapter added.

    Args:
        base: folder with config.json and safetensors in float32, float16 or bfloat16.
        adapter: folder of a downloaded checkpoint, layout "peft".
        target: a folder that isn't there yet.

    Returns:
        The target.

    Raises:
        InvalidRequest: if a folder is not what it should be, or the base model lacks what the adapter acts on.
    """
    base, adapter, target = Path(base), Path(adapter), Path(target)
    if target.exists():
        raise InvalidRequest(f"{target} is there already: name a folder that isn't")
    files = sorted(base.glob("*.safetensors"))
    if not files or not (base / _CONFIG).is_file():
        raise InvalidRequest(f"{base} holds no model: it needs {_CONFIG} and safetensors")
    headers = {path: _read_header(path) for path in files}
    changes = _read_changes(adapter, {name for header in headers.values() for name in header.tensors})
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for path in sorted(base.iterdir()):
        if path.is_file() and path not in headers and path.name != _INDEX:
            shutil.copyfile(path, unfinished / path.name)
    placed: dict[str, str] = {}
    for path, header in headers.items():
        names = _write(path, header, unfinished / path.name, changes)
        placed |= dict.fromkeys(names, path.name)
    if f"{_HEAD}.weight" in {change.copy_as for change in changes.values()}:
        _untie(unfinished / _CONFIG)
    if (base / _INDEX).is_file():
        size = sum((unfinished / path.name).stat().st_size for path in files)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (unfinished / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    unfinished.rename(target)
    return target


# ---------------------------------------------------------------- what is added


@dataclass(frozen=True, eq=False)
class _Change:
    """What is added to a tensor: scale x B A, of a matrix or of one for each expert.

    Attributes:
        a, b: float32 [rank, in] and [out, rank], or [experts, rank, in] and [experts, out, rank].
        copy_as: the sum is a further tensor of this name, and the tensor stays.
    """

    a: Float32Array
    b: Float32Array
    scale: float
    copy_as: str | None = None

    def added_to(self, weight: Float32Array) -> Float32Array:
        if weight.shape != (*self.a.shape[:-2], self.b.shape[-2], self.a.shape[-1]):
            raise InvalidRequest("the adapter's matrices don't fit the base model's: it is of another model")
        return (weight + self.scale * (self.b @ self.a)).astype(np.float32)


def _read_changes(adapter: Path, names: Collection[str]) -> dict[str, _Change]:
    """By name of a tensor of the base model.

    Args:
        names: of all its tensors.
    """
    try:
        config = cast("dict[str, Any]", json.loads((adapter / layouts.CONFIG).read_text(encoding="utf-8")))
        tensors, metadata = layouts.read_tensors(adapter / layouts.WEIGHTS)
        scale, rank = float(config["lora_alpha"]) / int(config["r"]), int(config["r"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest(f"{adapter} holds no adapter in PEFT's layout ({error})") from error
    renamed = cast("list[tuple[str, str]]", json.loads(metadata.get(layouts.SERVING_NAMES, "[]")))
    changes: dict[str, _Change] = {}
    for module in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        a, b = (tensors[f"{module}.lora_{matrix}.weight"][1].view(np.float32) for matrix in "AB")
        name = module.removeprefix(_PREFIX)
        spellings = dict.fromkeys([layouts.renamed(name, renamed), name])
        found = next((made for one in spellings if (made := _placed(one, a, b, scale, rank, names))), None)
        if found is None:
            raise InvalidRequest(f"the base model's files have no {name}, on which the adapter acts")
        changes |= found
    return changes


def _placed(
    name: str, a: Float32Array, b: Float32Array, scale: float, rank: int, names: Collection[str]
) -> dict[str, _Change]:
    """The changes that a pair of matrices makes to the tensors of a base model; none if it has no such tensor."""
    if f"{name}.weight" in names:
        return {f"{name}.weight": _Change(a, b, scale)}
    if name.rpartition(".")[2] == _HEAD:
        tied = [other for other in names if other.endswith(_EMBEDDING)]
        return {tied[0]: _Change(a, b, scale, f"{_HEAD}.weight")} if len(tied) == 1 else {}
    experts, is_first = name.removesuffix(".base_layer"), name.endswith(".base_layer")
    if not experts.endswith(".experts"):
        return {}
    # PEFT's: A of all experts below each other, B with the experts of a rank beside each other.
    a_each = a.reshape(-1, rank, a.shape[1])
    b_each = b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
    whole = f"{experts}.{'gate_up_proj' if is_first else 'down_proj'}"
    if whole in names:
        return {whole: _Change(a_each, b_each, scale)}
    matrices = ("gate_proj", "up_proj") if is_first else ("down_proj",)
    found = {
        f"{experts}.{expert}.{matrix}.weight": _Change(a_each[expert], part, scale)
        for expert in range(len(a_each))
        for matrix, part in zip(matrices, np.split(b_each[expert], len(matrices)), strict=True)
    }
    return found if all(one in names for one in found) else {}


def _untie(path: Path) -> None:
    config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Header:
    """Of a safetensors file: its tensors' entries in the order of their bytes, which begin at `start`."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size:
                raise ValueError("it is cut off, or no safetensors file")
            entries = cast("dict[str, Any]", json.loads(file.read(size)))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} can't be read ({error}): download the model again") from error
    metadata = cast("dict[str, str]", entries.pop("__metadata__", {"format": "pt"}))
    ordered = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"][0])
    return _Header(dict(ordered), metadata, 8 + size)


def _write(source: Path, header: _Header, target: Path, changes: Mapping[str, _Change]) -> list[str]:
    """Write a file with its changes; returns the names of its tensors."""
    order = [(name, name) for name in header.tensors]
    order += [
        (change.copy_as, name)
        for name, change in changes.items()
        if change.copy_as is not None and name in header.tensors
    ]
    entries: dict[str, Any] = {"__metadata__": header.metadata}
    offset = 0
    for name, of in order:
        begin, end = header.tensors[of]["data_offsets"]
        entries[name] = {**header.tensors[of], "data_offsets": [offset, offset + end - begin]}
        offset += end - begin
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    with source.open("rb") as read, target.open("wb") as written:
        written.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, of in order:
            raw = _read_bytes(read, header, of)
            change = changes.get(of)
            if change is not None and (change.copy_as is None or change.copy_as == name):
                raw = _added(raw, header.tensors[of], change, of)
            written.write(raw)
    return [name for name, _ in order]


def _read_bytes(file: BinaryIO, header: _Header, name: str) -> bytes:
    begin, end = header.tensors[name]["data_offsets"]
    file.seek(header.start + begin)
    return file.read(end - begin)


def _added(raw: bytes, entry: Mapping[str, Any], change: _Change, name: str) -> bytes:
    kind, shape = cast("str", entry["dtype"]), tuple(cast("list[int]", entry["shape"]))
    if kind not in _SIZES or len(raw) != _SIZES[kind] * math.prod(shape):
        raise InvalidRequest(f"{name} is {kind}: only float32, float16 and bfloat16 can be merged into")
    return _from_float32(change.added_to(_to_float32(raw, kind).reshape(shape)), kind).tobytes()


def _to_float32(raw: bytes, kind: str) -> Float32Array:
    if kind == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if kind == "F32" else "<f2").astype(np.float32)


def _from_float32(values: Float32Array, kind: str) -> Array:
    if kind == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        # To the nearest, and of two as near to the even one.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return values.astype("<f4" if kind == "F32" else "<f2")
