"""Rows of different lengths behind each other: each must get what it gets alone."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import random_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.packed_rows import NAME, PackedRows

CPU = torch.device("cpu")
SPECS = {
    "ada": AdapterSpec(rank=4, seed=1),
    "bob": AdapterSpec(rank=4, seed=2),
    "cyd": AdapterSpec(rank=3, seed=3, train_unembed=False),
}
LENGTHS = {"ada": (9, 1, 5), "bob": (12,), "cyd": (2, 7)}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_every_token_has_one_place_and_rows_of_similar_length_stand_together(lengths: list[int]) -> None:
    packed = PackedRows.of(lengths, CPU)
    tokens = sum(lengths)
    assert packed.positions[0].tolist() == [place for length in lengths for place in range(length)]
    for token_of, place_of in (
        (packed.token_of, packed.place_of),
        (packed.row_token_of, packed.row_place_of),
    ):
        assert token_of[place_of].tolist() == list(range(tokens))
    assert sum(rows for rows, _ in packed.groups) == len(lengths)
    places = sum(rows * longest for rows, longest in packed.groups)
    assert len(packed.token_of) == places <= tokens / 0.75
    rows = packed.side_by_side(torch.arange(tokens).view(1, -1, 1))
    assert rows.shape == (len(lengths), max(lengths), 1)
    assert packed.packed(rows).flatten().tolist() == list(range(tokens))


def rows_of(random_row: Any) -> list[Row]:
    return [
        random_row(who, length, seed)
        for seed, (who, length) in enumerate(
            (who, length) for who, lengths in LENGTHS.items() for length in lengths
        )
    ]


def backend_of(directory: Path) -> TransformersBackend:
    backend = TransformersBackend(ModelConfig(directory))
    for adapter_id, spec in SPECS.items():
        backend.add_adapter(adapter_id, spec)
    return backend


def gradients(backend: TransformersBackend) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for adapter_id in SPECS:
        matrices = backend.export_adapter(adapter_id, False, with_gradients=True).gradients
        assert matrices is not None
        found |= {f"{adapter_id} {name}": matrix for name, matrix in matrices.items()}
    return found


def test_rows_together_give_what_each_gives_alone(tiny_model_dir: Path, random_row: Any) -> None:
    together, alone = backend_of(tiny_model_dir), backend_of(tiny_model_dir)
    assert together.info.packs_rows
    rows = rows_of(random_row)
    [found] = together.forward_backward([rows])
    expected = [result for [result] in alone.forward_backward([[row] for row in rows])]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert_close(gradients(together), gradients(alone))


def test_no_token_is_computed_that_is_not_in_a_row(
    tiny_model_dir: Path, random_row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of(tiny_model_dir)
    sizes: list[int] = []
    original = torch.nn.functional.linear

    def noting(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(x))
        return original(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    backend.forward_backward([rows_of(random_row)])
    assert set(sizes) == {sum(sum(lengths) for lengths in LENGTHS.values())}


def test_a_model_with_a_window_is_not_packed(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    for window, packs in ((8, False), (None, True)):
        directory = random_models.save(
            MistralConfig(**sizes, **heads, sliding_window=window), tmp_path / str(window)
        )
        assert TransformersBackend(ModelConfig(directory)).info.packs_rows is packs


def test_a_model_that_mixes_packed_rows_is_not_packed(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(cast("Any", AttentionInterface)._global_mapping, NAME, plain)
    assert not TransformersBackend(ModelConfig(tiny_model_dir)).info.packs_rows
