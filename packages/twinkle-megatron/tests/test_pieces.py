"""How micro-batches are cut for the pipeline, and shared out between copies of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from twinkle.server.backends.protocol import Row
from twinkle_megatron.groups import Group, Groups
from twinkle_megatron.pieces import MIN_PIECE_TOKENS_CPU, PIECES_A_STAGE, Piece, cut, tokens_at_once


def groups(pipeline: int = 1, data: int = 1, index: int = 0) -> Groups:
    nobody: Any = None
    one = Group(nobody, 1, 0)
    return Groups(
        world=one,
        control=one,
        tensor=one,
        pipeline=Group(nobody, pipeline, 0),
        data=Group(nobody, data, index),
        expert=one,
        copies=one,
        device=torch.device("cpu"),
    )


def row(who: str, length: int = MIN_PIECE_TOKENS_CPU) -> Row:
    return Row(
        who, np.zeros(length, np.int64), "cross_entropy", {"target_tokens": np.zeros(length, np.int64)}
    )


def place(one: Row) -> tuple[int, int]:
    return 0, ord(one.adapter_id)


def test_without_a_pipeline_a_micro_batch_is_one_piece_in_the_order_of_adapters() -> None:
    rows = [row(who) for who in "cabac"]
    [piece] = cut([(5, rows)], place, groups())
    assert [one.adapter_id for one in piece.rows] == list("aabcc")
    assert piece.own_places == [(5, 1), (5, 3), (5, 2), (5, 0), (5, 4)]
    assert [rows[k] for _, k in piece.own_places] == piece.own_rows == piece.rows


@pytest.mark.parametrize("stages", [2, 4])
def test_tenants_follow_each_other_through_the_stages(stages: int) -> None:
    rows = [row(who) for who in "abcdefgh" for _ in range(8)]
    pieces = cut([(0, rows)], place, groups(pipeline=stages))
    assert len(pieces) == PIECES_A_STAGE * stages
    assert [one.adapter_id for piece in pieces for one in piece.rows] == sorted(
        one.adapter_id for one in rows
    )
    assert {len(piece.rows) for piece in pieces} == {len(rows) // len(pieces)}


def test_what_the_engine_has_cut_already_is_cut_no_further() -> None:
    batches = [(i, [row("a"), row("b")]) for i in range(2 * PIECES_A_STAGE)]
    assert len(cut(batches, place, groups(pipeline=2))) == 2 * PIECES_A_STAGE


def test_no_piece_is_too_small_to_be_worth_its_messages() -> None:
    rows = [row("a", MIN_PIECE_TOKENS_CPU // 4) for _ in range(10)]
    pieces = cut([(0, rows)], place, groups(pipeline=2))
    assert len(pieces) == 2
    assert len(cut([(0, rows[:1])], place, groups(pipeline=2))) == 1


def test_copies_of_the_model_share_out_the_rows_of_each_piece() -> None:
    rows = [row(who) for who in "abcab"]
    shares = [cut([(0, rows)], place, groups(data=2, index=index)) for index in range(2)]
    assert [[one.adapter_id for one in pieces[0].own_rows] for pieces in shares] == [
        ["a", "b", "c"],
        ["a", "b"],
    ]
    assert sorted(k for pieces in shares for piece in pieces for _, k in piece.own_places) == [0, 1, 2, 3, 4]
    [lonely] = cut([(0, rows[:1])], place, groups(data=2, index=1))
    assert lonely.own_rows == [] and len(lonely.rows) == 1


def test_a_stage_holds_as_many_pieces_as_there_are_stages_from_it_on() -> None:
    pieces = [Piece([row("a", length)] * 2, [], []) for length in (10, 30, 20)]
    assert tokens_at_once(pieces, groups()) == 60
    assert tokens_at_once(pieces, groups(pipeline=2)) == 100
    assert tokens_at_once(pieces, groups(pipeline=4)) == 120
    assert tokens_at_once(pieces, groups(pipeline=4, data=2)) == 60
