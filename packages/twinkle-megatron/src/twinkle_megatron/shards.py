"""Which part of each of an adapter's matrices this rank keeps.

Names, order and shapes are those of the whole model in Transformers, so that an adapter is the same however many ranks
hold it: it starts with the same numbers, and is exported and imported in PEFT's form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from twinkle.protocol.types import Array
from twinkle.server.backends.lora.adapter_state import peft_names
from twinkle.server.backends.lora.banks import Bank, Layout, LinearShape, Place
from twinkle.server.backends.lora.experts import DOWN, GATE_UP
from twinkle.server.backends.lora.module_groups import ModuleGroup, module_group
from twinkle_megatron import delta_net, joins
from twinkle_megatron.architecture import Architecture, head_size, shared_expert_size
from twinkle_megatron.groups import Group, Groups
from twinkle_megatron.head import NAME as HEAD

# Which of a layer's features are spread over ranks: output, input, or whole experts.
Cut: TypeAlias = Literal["out", "in", "experts"]


@dataclass(frozen=True)
class Target:
    """A layer of the whole model that adapters act on.

    Attributes:
        shape: in the whole model.
        number: of its decoder layer; None for the output head.
        sections: sizes of consecutive parts of its outputs, each of which is shared out by itself.
    """

    shape: LinearShape
    cut: Cut
    group: ModuleGroup
    number: int | None
    sections: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """This rank's part of a target's matrices.

    Attributes:
        shape: of the part.
        out, inner, experts: the part of the target's out_features (of each section), in_features and experts.
        holders: how many ranks of the whole model hold the same numbers of A, and of B.
        is_partial: whether the gradients of A, and of B, that one rank computes are a part of a sum over the tensor
            group.
    """

    target: Target
    shape: LinearShape
    out: tuple[slice, ...]
    inner: slice
    experts: slice
    holders: tuple[int, int]
    is_partial: tuple[bool, bool]

    def of_a(self, matrix: Array) -> Array:
        """This rank's part of PEFT's A: [rank, in] or, of all experts, [experts * rank, in]."""
        if self.target.shape.experts is None:
            return matrix[:, self.inner]
        each = matrix.reshape(self.target.shape.experts, -1, matrix.shape[1])
        return each[self.experts].reshape(-1, matrix.shape[1])

    def of_b(self, matrix: Array) -> Array:
        """This rank's part of PEFT's B: [out, rank] or, of all experts, [out, rank * experts]."""
        if self.target.shape.experts is None:
            part = np.concatenate([matrix[own] for own in self.out])
            missing = self.shape.out_features - len(part)  # of a padded vocabulary
            return np.pad(part, ((0, missing), (0, 0))) if missing else part
        each = matrix.reshape(matrix.shape[0], -1, self.target.shape.experts)
        return each[:, :, self.experts].reshape(matrix.shape[0], -1)


def targets(architecture: Architecture) -> list[Target]:
    """All layers that adapters can act on, in the order of the module tree in Transformers."""
    found: list[Target] = []
    for number in range(architecture.config.num_layers):
        for shape, cut in _layer(architecture, number):
            group = module_group(shape.name)
            assert group is not None, "the table below has no routers"
            parts = delta_net.sections(architecture.hf) if shape.name.endswith(".in_proj_qkv") else ()
            found.append(Target(shape, cut, group, number, parts or (shape.out_features,)))
    head = LinearShape(HEAD, architecture.hf.hidden_size, architecture.vocab_size)
    return [*found, Target(head, "out", "unembed", None, (architecture.padded_vocab_size,))]


def _layer(architecture: Architecture, number: int) -> Iterator[tuple[LinearShape, Cut]]:
    prefix = f"model.layers.{number}."
    if number in architecture.linear_layers:
        yield from _delta_net(architecture, f"{prefix}linear_attn.")
    else:
        yield from _attention(architecture, f"{prefix}self_attn.")
    hf, mlp = architecture.hf, f"{prefix}mlp."
    hidden = int(hf.hidden_size)
    if number not in architecture.expert_layers:
        yield from _feed_forward(mlp, hidden, int(hf.intermediate_size))
        return
    inner, count = int(hf.moe_intermediate_size), int(hf.num_experts)
    yield LinearShape(f"{mlp}experts.{GATE_UP}", hidden, 2 * inner, count), "experts"
    yield LinearShape(f"{mlp}experts.{DOWN}", inner, hidden, count), "experts"
    if size := shared_expert_size(hf):
        yield from _feed_forward(f"{mlp}shared_expert.", hidden, size)


def _feed_forward(mlp: str, hidden: int, inner: int) -> Iterator[tuple[LinearShape, Cut]]:
    yield LinearShape(f"{mlp}gate_proj", hidden, inner), "out"
    yield LinearShape(f"{mlp}up_proj", hidden, inner), "out"
    yield LinearShape(f"{mlp}down_proj", inner, hidden), "in"


def _delta_net(architecture: Architecture, attention: str) -> Iterator[tuple[LinearShape, Cut]]:
    hf = architecture.hf
    hidden, heads = int(hf.hidden_size), int(hf.linear_num_value_heads)
    qkv = delta_net.sections(hf)
    out_proj = LinearShape(f"{attention}out_proj", qkv[2], hidden)
    if joins.has_key_head_order(hf):
        yield LinearShape(f"{attention}in_proj_qkvz", hidden, sum(qkv) + qkv[2]), "out"
        yield LinearShape(f"{attention}in_proj_ba", hidden, 2 * heads), "out"
        yield out_proj, "in"
        return
    yield out_proj, "in"
    yield LinearShape(f"{attention}in_proj_qkv", hidden, sum(qkv)), "out"
    yield LinearShape(f"{attention}in_proj_z", hidden, qkv[2]), "out"
    yield LinearShape(f"{attention}in_proj_b", hidden, heads), "out"
    yield LinearShape(f"{attention}in_proj_a", hidden, heads), "out"


def _attention(architecture: Architecture, attention: str) -> Iterator[tuple[LinearShape, Cut]]:
    hf = architecture.hf
    hidden, size = int(hf.hidden_size), head_size(hf)
    queries, keys = hf.num_attention_heads * size, hf.num_key_value_heads * size
    gated = 2 if architecture.config.attention_output_gate else 1
    yield LinearShape(f"{attention}q_proj", hidden, gated * queries), "out"
    yield LinearShape(f"{attention}k_proj", hidden, keys), "out"
    yield LinearShape(f"{attention}v_proj", hidden, keys), "out"
    yield LinearShape(f"{attention}o_proj", queries, hidden), "in"


def shards(targets: Sequence[Target], architecture: Architecture, groups: Groups) -> list[Shard]:
    """This rank's parts of the `targets` in its stage."""
    stage = architecture.config.num_layers // groups.pipeline.size
    here = range(groups.pipeline.index * stage, (groups.pipeline.index + 1) * stage)
    return [
        _shard(target, architecture, groups)
        for target in targets
        if (groups.is_last_stage if target.number is None else target.number in here)
    ]


def _shard(target: Target, architecture: Architecture, groups: Groups) -> Shard:
    shape, everything, all_out = target.shape, slice(None), (slice(None),)
    tensor, copies = groups.tensor, groups.data.size
    if target.cut == "experts":
        assert shape.experts is not None
        count = shape.experts // groups.expert.size
        own = slice(groups.expert.index * count, (groups.expert.index + 1) * count)
        part = LinearShape(shape.name, shape.in_features, shape.out_features, count)
        holders = groups.copies.size
        return Shard(target, part, all_out, everything, own, (holders, holders), (False, False))
    by_sequence = bool(architecture.config.sequence_parallel)
    if target.cut == "out":
        # The last rank's part of the head is smaller than what it computes with: the vocabulary may be padded.
        part = LinearShape(shape.name, shape.in_features, sum(target.sections) // tensor.size)
        holders = (tensor.size * copies, copies)
        own = own_slices(target.sections, tensor)
        return Shard(target, part, own, everything, everything, holders, (by_sequence, False))
    count = shape.in_features // tensor.size
    own = slice(tensor.index * count, (tensor.index + 1) * count)
    part = LinearShape(shape.name, count, shape.out_features)
    return Shard(target, part, all_out, own, everything, (copies, tensor.size * copies), (False, by_sequence))


def own_slices(sections: Sequence[int], ranks: Group) -> tuple[slice, ...]:
    """A rank's part of each of consecutive sections, which the ranks share out evenly."""
    starts = accumulate(sections, initial=0)
    sizes = [section // ranks.size for section in sections]
    return tuple(
        slice(start + ranks.index * size, start + (ranks.index + 1) * size)
        for start, size in zip(starts, sizes, strict=False)
    )


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True, eq=False)
class ShardedLayout(Layout):
    """Where this rank's part of an adapter is in a row; `modules` and all below it are of the whole adapter.

    Attributes:
        targets: the layers of the whole model that the adapter acts on.
        parts: this rank's parts of them.
        shares: float32 [size], on the ranks' device: 1 / the number of ranks that hold the same number, so that a sum
            over all ranks counts it once.
    """

    targets: list[Target]
    parts: list[Shard]
    groups: Groups
    shares: Tensor

    @property
    def modules(self) -> list[str]:
        return [target.shape.name for target in self.targets]

    def shapes(self) -> dict[str, tuple[int, int]]:
        return Layout.of([target.shape for target in self.targets], self.rank).shapes()

    def initial_row(self, seed: int) -> Tensor:
        """This rank's part of the row that a single rank would start with.

        Drawn one matrix of the whole model at a time: no rank ever holds all of them.
        """
        generator = torch.Generator().manual_seed(seed % 2**63)
        own = {shard.shape.name: shard for shard in self.parts}
        row = torch.zeros(1, self.size)
        for target in self.targets:
            shape = target.shape
            matrix = torch.empty((shape.experts or 1) * self.rank, shape.in_features)
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
            if (shard := own.get(shape.name)) is not None:
                place = self.a[shape.name].view(row)[0]
                place.copy_(torch.from_numpy(np.ascontiguousarray(shard.of_a(matrix.numpy()))).view_as(place))
        return row[0]

    def join(self, matrices: Mapping[str, Array]) -> Tensor:
        """This rank's part of the whole adapter's matrices, as a row."""
        cut: dict[str, Array] = {}
        for shard in self.parts:
            a_name, b_name = peft_names(shard.shape.name)
            cut[a_name], cut[b_name] = shard.of_a(matrices[a_name]), shard.of_b(matrices[b_name])
        return super().join(cut)

    def split(self, row: Tensor) -> dict[str, Array]:
        """The whole adapter's matrices on rank 0, none on the others. All ranks call it together."""
        groups = self.groups
        own = _given(super().split(row), self.parts, groups)
        is_first = groups.world.index == 0
        kinds: list[list[_Kind]] = [[] for _ in range(groups.world.size)]
        mine = [(part.name, part.place, part.matrix.shape) for part in own]
        dist.gather_object(mine, kinds if is_first else None, group=groups.control.ranks)
        if not is_first:
            _send(own, groups.control)
            return {}
        return _assemble(chain(own, _received(kinds, groups.control)), self.targets)


def sharded_layout(
    targets: list[Target], rank: int, architecture: Architecture, groups: Groups
) -> ShardedLayout:
    parts = shards(targets, architecture, groups)
    own = Layout.of([shard.shape for shard in parts], rank)
    shares = torch.ones(1, own.size)
    for shard in parts:
        name = shard.shape.name
        own.a[name].view(shares).fill_(1 / shard.holders[0])
        own.b[name].view(shares).fill_(1 / shard.holders[1])
    return ShardedLayout(
        **vars(own), targets=targets, parts=parts, groups=groups, shares=shares[0].to(groups.device)
    )


def layout_of(bank: Bank) -> ShardedLayout:
    """A bank's layout: this backend makes no others."""
    assert isinstance(bank.layout, ShardedLayout)
    return bank.layout


# Of a part its name, place and shape.
_Kind: TypeAlias = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of one of an adapter's matrices, to be assembled."""

    name: str
    place: int
    matrix: Array


def _given(matrices: Mapping[str, Array], parts: Sequence[Shard], groups: Groups) -> list[_Part]:
    """The parts that this rank contributes, so that each number is contributed by one rank only."""
    given: list[_Part] = []
    for shard in parts:
        a_name, b_name = peft_names(shard.shape.name)
        if shard.target.cut == "experts":
            if groups.copies.index == 0:
                given += [_Part(name, groups.expert.index, matrices[name]) for name in (a_name, b_name)]
            continue
        if groups.data.index != 0:
            continue
        spread, whole = (b_name, a_name) if shard.target.cut == "out" else (a_name, b_name)
        given.append(_Part(spread, groups.tensor.index, matrices[spread]))
        if groups.tensor.index == 0:
            given.append(_Part(whole, 0, matrices[whole]))
    return given


def _send(own: Sequence[_Part], control: Group) -> None:
    """To rank 0, as one tensor: pickled they would be copied several times."""
    if own:
        flat = np.concatenate([part.matrix.reshape(-1) for part in own])
        dist.send(torch.from_numpy(flat), 0, group=control.ranks)


def _received(kinds: Sequence[Sequence[_Kind]], control: Group) -> Iterator[_Part]:
    """On rank 0 what the others send, one rank after the other.

    Args:
        kinds: by rank, of the parts that it sends.
    """
    for rank, theirs in enumerate(kinds[1:], start=1):
        if not theirs:
            continue
        sizes = [math.prod(shape) for _, _, shape in theirs]
        flat = torch.empty(sum(sizes))
        dist.recv(flat, rank, group=control.ranks)
        pieces = cast("tuple[Tensor, ...]", flat.split(sizes))
        for (name, place, shape), piece in zip(theirs, pieces, strict=True):
            yield _Part(name, place, piece.view(shape).numpy())


def _assemble(parts: Iterable[_Part], targets: Sequence[Target]) -> dict[str, Array]:
    """The adapter's matrices by PEFT name, in the order of the module tree."""
    found: dict[str, list[_Part]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    whole: dict[str, Array] = {}
    for target in targets:
        shape = target.shape
        a_name, b_name = peft_names(shape.name)
        a, b = (
            [part.matrix for part in sorted(found[name], key=lambda part: part.place)]
            for name in (a_name, b_name)
        )
        if shape.experts is None:
            whole[a_name] = np.concatenate(a, axis=1)
            whole[b_name] = _by_sections(b, target.sections)[: shape.out_features]
        else:
            whole[a_name] = np.concatenate(a)
            each = [matrix.reshape(shape.out_features, -1, shape.experts // len(b)) for matrix in b]
            whole[b_name] = np.concatenate(each, axis=2).reshape(shape.out_features, -1)
    return whole


def _by_sections(parts: Sequence[Array], sections: Sequence[int]) -> Array:
    """Parts of all ranks to the whole: each has its share of each section, behind each other."""
    if len(sections) == 1 or len(parts) == 1:
        return np.concatenate(parts)
    ends = np.cumsum(sections)[:-1] // len(parts)
    each = [np.split(part, ends) for part in parts]
    return np.concatenate([share for section in zip(*each, strict=True) for share in section])


# ---------------------------------------------------------------- gradients


def partial_places(layout: ShardedLayout) -> list[Place]:
    """Where gradients are of which one rank has computed only a part."""
    places: list[Place] = []
    for shard in layout.parts:
        name = shard.shape.name
        if shard.is_partial[0]:
            places.append(layout.a[name])
        if shard.is_partial[1]:
            places.append(layout.b[name])
    return places


def expert_places(layout: ShardedLayout) -> list[Place]:
    """Where the matrices of routed experts are."""
    names = [shard.shape.name for shard in layout.parts if shard.target.cut == "experts"]
    return [*(layout.a[name] for name in names), *(layout.b[name] for name in names)]
