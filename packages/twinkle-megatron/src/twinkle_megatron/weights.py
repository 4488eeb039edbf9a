"""Reads a Hugging Face checkpoint into this rank's part of the model: from each file only the rows or columns kept
here, so that no rank ever holds the whole model.

`table` is the map of names: what each of Megatron-Core's parameters is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.hf import base_folder
from twinkle_megatron import delta_net, joins
from twinkle_megatron.architecture import Architecture, shared_expert_size
from twinkle_megatron.build import first_layer
from twinkle_megatron.experts import RoutedExperts
from twinkle_megatron.groups import Group, Groups
from twinkle_megatron.joins import Join, side_by_side
from twinkle_megatron.shards import own_slices

# How a tensor of the checkpoint is shared out: by rows, by columns, or not at all.
Cut: TypeAlias = Literal["rows", "columns", "whole"]

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Source:
    """What a parameter is made of: tensors of the checkpoint, each cut in the same way.

    Attributes:
        join: how they make one, by their first dimension.
        sections: sizes of consecutive parts of the first tensor's rows, each of which is shared out by itself.
    """

    names: tuple[str, ...]
    cut: Cut = "whole"
    join: Join = side_by_side
    sections: tuple[int, ...] = ()


def table(architecture: Architecture, groups: Groups) -> Iterator[tuple[str, Source]]:
    """Parameters of this rank's `GPTModel` and their sources; `_load_experts` reads routed experts."""
    if groups.is_first_stage:
        yield "embedding.word_embeddings.weight", Source(("model.embed_tokens.weight",), "rows")
    start = first_layer(architecture, groups)
    for i in range(architecture.config.num_layers // groups.pipeline.size):
        yield from _layer(
            architecture, groups, f"decoder.layers.{i}.", f"model.layers.{start + i}.", start + i
        )
    if groups.is_last_stage:
        yield "decoder.final_layernorm.weight", Source(("model.norm.weight",))
        if not architecture.is_tied:
            yield "output_layer.weight", Source(("lm_head.weight",), "rows")
        elif not groups.is_first_stage:  # otherwise it is the embedding itself, see `tie`
            yield "output_layer.weight", Source(("model.embed_tokens.weight",), "rows")


def _layer(
    architecture: Architecture, groups: Groups, ours: str, theirs: str, number: int
) -> Iterator[tuple[str, Source]]:
    yield f"{ours}input_layernorm.weight", Source((f"{theirs}input_layernorm.weight",))
    if number in architecture.linear_layers:
        yield from _delta_net(architecture, groups, f"{ours}self_attention.", f"{theirs}linear_attn.")
    else:
        yield from _attention(architecture, groups, f"{ours}self_attention.", f"{theirs}self_attn.")
    yield f"{ours}pre_mlp_layernorm.weight", Source((f"{theirs}post_attention_layernorm.weight",))
    if number not in architecture.expert_layers:
        yield from _feed_forward(f"{ours}mlp.", f"{theirs}mlp.")
        return
    yield f"{ours}mlp.router.weight", Source((f"{theirs}mlp.gate.weight",))
    if shared_expert_size(architecture.hf):
        yield from _feed_forward(f"{ours}mlp.shared.mlp.", f"{theirs}mlp.shared_expert.")
        yield f"{ours}mlp.shared.gate", Source((f"{theirs}mlp.shared_expert_gate.weight",))


def _attention(
    architecture: Architecture, groups: Groups, ours: str, theirs: str
) -> Iterator[tuple[str, Source]]:
    qkv, join = tuple(f"{theirs}{part}_proj" for part in "qkv"), joins.of_attention(architecture, groups)
    yield f"{ours}linear_qkv.weight", Source(tuple(f"{part}.weight" for part in qkv), "rows", join)
    if architecture.has_qkv_bias:
        yield f"{ours}linear_qkv.bias", Source(tuple(f"{part}.bias" for part in qkv), "rows", join)
    if architecture.has_qk_norm:
        yield f"{ours}q_layernorm.weight", Source((f"{theirs}q_norm.weight",))
        yield f"{ours}k_layernorm.weight", Source((f"{theirs}k_norm.weight",))
    yield f"{ours}linear_proj.weight", Source((f"{theirs}o_proj.weight",), "columns")


def _delta_net(
    architecture: Architecture, groups: Groups, ours: str, theirs: str
) -> Iterator[tuple[str, Source]]:
    hf, join = architecture.hf, joins.of_delta_net(architecture, groups)
    sections = delta_net.sections(hf)
    projections = tuple(f"{theirs}{name}.weight" for name in joins.delta_net_layers(hf))
    first = () if joins.has_key_head_order(hf) else sections
    yield f"{ours}in_proj.weight", Source(projections, "rows", join, first)
    yield f"{ours}conv1d.weight", Source((f"{theirs}conv1d.weight",), "rows", sections=sections)
    yield f"{ours}A_log", Source((f"{theirs}A_log",), "rows")
    yield f"{ours}dt_bias", Source((f"{theirs}dt_bias",), "rows")
    yield f"{ours}out_norm.weight", Source((f"{theirs}norm.weight",))
    yield f"{ours}out_proj.weight", Source((f"{theirs}out_proj.weight",), "columns")


def _feed_forward(ours: str, theirs: str) -> Iterator[tuple[str, Source]]:
    gate_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    yield f"{ours}linear_fc1.weight", Source(gate_up, "rows")
    yield f"{ours}linear_fc2.weight", Source((f"{theirs}down_proj.weight",), "columns")


def load(model: nn.Module, path: Path, architecture: Architecture, groups: Groups) -> None:
    """Fill the model.

    Raises:
        InvalidRequest: if a tensor is missing or its shape differs from the configuration.
    """
    sources = list(table(architecture, groups))
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    mixtures = [(name, module) for name, module in modules if isinstance(module, RoutedExperts)]
    with _Checkpoint(path) as files, torch.no_grad():
        progress = tqdm(
            total=len(sources) + len(mixtures),
            desc=f"Loading weights, rank {groups.world.index}",
            unit="tensor",
            disable=groups.world.index != 0,
        )
        for name, source in sources:
            _fill(model.get_parameter(name), source, files, architecture, groups.tensor)
            progress.update()
        for name, module in mixtures:
            number = first_layer(architecture, groups) + int(name.split(".")[2])
            _load_experts(module, f"model.layers.{number}.mlp.experts", files)
            progress.update()
        progress.close()
    tie(model, architecture, groups)


def tie(model: nn.Module, architecture: Architecture, groups: Groups) -> None:
    """If the output head is the embedding, and both are here, make them share their weights."""
    if architecture.is_tied and groups.is_first_stage and groups.is_last_stage:
        whole = cast("Any", model)
        whole.output_layer.weight = whole.embedding.word_embeddings.weight


def shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the checkpoint's tensors, by name; their data is not read.

    Raises:
        InvalidRequest: if the checkpoint is incomplete, or can't be read.
    """
    with _Checkpoint(path) as files:
        return {name: list(files.slices(name).get_shape()) for name in files.names()}


def _fill(
    parameter: nn.Parameter, source: Source, files: _Checkpoint, architecture: Architecture, tensor: Group
) -> None:
    first, *others = source.names
    parts = [
        files.part(first, source.cut, tensor, source.sections),
        *(files.part(name, source.cut, tensor) for name in others),
    ]
    joined = source.join([part.movedim(0, -1) for part in parts]).movedim(-1, 0)
    # The last rank's share of the vocabulary may be padded; the padding is never read.
    rows = joined.shape[0]
    is_vocabulary = (
        source.names[0] in _VOCABULARY
        and files.slices(source.names[0]).get_shape()[0] == architecture.vocab_size
    )
    if joined.shape[1:] != parameter.shape[1:] or (rows != parameter.shape[0] and not is_vocabulary):
        raise InvalidRequest(
            f"model: {', '.join(source.names)} give {list(joined.shape)}, but by config.json it must be "
            f"{list(parameter.shape)}; the checkpoint and its config.json don't belong together"
        )
    parameter[:rows].copy_(joined)
    _check_finite(parameter[:rows], files, source.names)
    parameter[rows:].zero_()


def _check_finite(own: Tensor, files: _Checkpoint, names: Sequence[str]) -> None:
    """Check a parameter that was read from these tensors."""
    if own.numel() and not bool(torch.stack(torch.aminmax(own)).isfinite().all()):
        raise base_folder.not_finite(files.path, ", ".join(names))


def _load_experts(module: RoutedExperts, prefix: str, files: _Checkpoint) -> None:
    """Read this rank's routed experts of a layer, stored as one tensor per expert or one for all."""
    first, count = module.first_expert, module.gate_up_proj.shape[0]
    stacked = {"gate_up_proj": module.gate_up_proj, "down_proj": module.down_proj}
    if f"{prefix}.gate_up_proj" in files:
        for name, parameter in stacked.items():
            parameter.copy_(files.slices(f"{prefix}.{name}")[first : first + count])
            _check_finite(parameter, files, [f"{prefix}.{name}"])
        return
    for i in range(count):
        expert = f"{prefix}.{first + i}."
        gate, up = (files.part(f"{expert}{name}_proj.weight", "whole", None) for name in ("gate", "up"))
        module.gate_up_proj[i].copy_(torch.cat([gate, up]))
        module.down_proj[i].copy_(files.part(f"{expert}down_proj.weight", "whole", None))
    for name, parameter in stacked.items():
        _check_finite(parameter, files, [f"{prefix}.*.{part}" for part in name.split("_")[:-1]])


@dataclass(eq=False)
class _Checkpoint:
    """The safetensors of a directory, opened when they are first needed, never read whole."""

    path: Path
    _file_of: dict[str, Path] = field(default_factory=dict[str, Path])
    _open: dict[Path, Any] = field(default_factory=dict[Path, Any])
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Checkpoint:
        self._file_of = base_folder.tensor_files(self.path)
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def slices(self, name: str) -> Any:
        """A tensor that is read only where it is indexed."""
        if name not in self:
            raise base_folder.missing(self.path, [name], "the model")
        stored = self._stored(name)
        return self._opened(self._file_of[stored]).get_slice(stored)

    def _stored(self, name: str) -> str:
        """A text model's tensor in the files, where the model may be a part of one that also sees."""
        return name if name in self._file_of else name.replace("model.", "model.language_model.", 1)

    def part(self, name: str, cut: Cut, ranks: Group | None, sections: Sequence[int] = ()) -> Tensor:
        """A rank's share of a tensor; the last one's is smaller if the rows can't be shared out evenly.

        Args:
            sections: as in `Source`.
        """
        tensor = self.slices(name)
        if cut == "whole" or ranks is None or ranks.size == 1:
            return tensor[:]
        if sections and tensor.get_shape()[0] == sum(sections):
            return torch.cat([tensor[own] for own in own_slices(sections, ranks)])
        if cut == "rows":
            share = -(-tensor.get_shape()[0] // ranks.size)
            return tensor[ranks.index * share : (ranks.index + 1) * share]
        share = tensor.get_shape()[1] // ranks.size
        return tensor[:, ranks.index * share : (ranks.index + 1) * share]

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            opened = cast("Any", safe_open)(file, framework="pt")
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]
