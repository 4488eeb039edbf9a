"""Has Megatron-Bridge read a checkpoint into this rank's part of the model, by its own map of names.

Adapters use Transformers' names of the layers, which are Llama's: a map with other names is refused, as is one that
leaves out a parameter of the model or a tensor of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from twinkle_megatron import bridge, weights
from twinkle_megatron.architecture import Architecture
from twinkle_megatron.groups import Groups
from twinkle_megatron.weights import Source

_HEAD = "output_layer.weight"
# Tensors that are in some checkpoints but not needed by any model.
_SPARE = ("rotary_emb.inv_freq",)


def load(model: nn.Module, path: Path, architecture: Architecture, groups: Groups) -> None:
    """Fill the model. All ranks take part, since the first rank of those that share a layer reads it for the others.

    Raises:
        InvalidRequest: if the checkpoint and Megatron-Bridge's map of it don't fit the model; on all ranks alike.
    """
    auto = bridge.auto_bridge().from_hf_pretrained(str(path))
    # It asks the model for this, which Megatron-Core's own configuration doesn't have.
    cast("Any", model).config.share_embeddings_and_output_weights = architecture.is_tied
    tasks = [task for task in auto.get_conversion_tasks(model) if task is not None]
    shapes = weights.shapes(path)
    problems = [*_misfits(model, tasks, shapes, architecture, groups), *_unread(tasks, shapes, architecture)]
    everywhere: list[list[str]] = [[] for _ in range(groups.world.size)]
    dist.all_gather_object(everywhere, problems, group=groups.control.ranks)
    for found in everywhere:
        if found:
            raise bridge.refusal(architecture.hf, "; ".join(found[:3]))
    auto.load_hf_weights([model])
    weights.tie(model, architecture, groups)


def _misfits(
    model: nn.Module,
    tasks: Sequence[Any],
    shapes: Mapping[str, Sequence[int]],
    architecture: Architecture,
    groups: Groups,
) -> list[str]:
    """What is wrong with this rank's parameters."""
    names = {task.param_name: _names(task) for task in tasks if task.megatron_module is not None}
    problems: list[str] = []
    for name, source in weights.table(architecture, groups):
        if name == _HEAD and architecture.is_tied:  # filled from the embedding
            continue
        found = names.get(name, [])
        if not found:
            problems.append(f"the checkpoint has nothing for {name}")
        elif ".linear_" in name and set(found) != set(source.names):
            problems.append(f"{', '.join(found)} where adapters expect {', '.join(source.names)}")
        elif not _fits(
            [shapes[n] for n in found], source, model.get_parameter(name).shape, groups.tensor.size
        ):
            problems.append(f"{', '.join(found)} have another shape than config.json says")
    return problems


def _fits(parts: list[Sequence[int]], source: Source, own: Sequence[int], ranks: int) -> bool:
    """Whether the concatenated parts make the whole of which each rank has `own`."""
    wanted = list(own)
    if source.cut == "rows":
        wanted[0] *= ranks
    elif source.cut == "columns":
        wanted[1] *= ranks
    missing = wanted[0] - sum(part[0] for part in parts)
    is_vocabulary = source.cut == "rows" and len(parts) == 1  # may be padded, by less than a row per rank
    most = ranks - 1 if is_vocabulary else 0
    return 0 <= missing <= most and all(list(part[1:]) == wanted[1:] for part in parts)


def _unread(
    tasks: Sequence[Any], shapes: Mapping[str, Sequence[int]], architecture: Architecture
) -> list[str]:
    """Tensors that no rank's parameters are made of, so that their part of the model would not be computed."""
    read = {name for task in tasks for name in _names(task)}
    if architecture.is_tied:
        read.add("lm_head.weight")  # some checkpoints have it twice
    spare = [name for name in shapes if name not in read and not name.endswith(_SPARE)]
    return [f"it leaves out {', '.join(spare[:3])}"] if spare else []


def _names(task: Any) -> list[str]:
    found = task.mapping.hf_param
    return [found] if isinstance(found, str) else list(found.values())
