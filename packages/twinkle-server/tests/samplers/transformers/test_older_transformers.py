"""What older versions of Transformers say and read in another way than that which the other tests run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

from twinkle.server.samplers.transformers import layer_kinds
from twinkle.server.samplers.transformers.cache import SlotCache
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds, Span

WINDOW = 32


def one_for_all_layers(config: Any) -> tuple[list[str], dict[str, Any]]:
    return config.layer_types, {"sliding_window": config.sliding_window}


@pytest.mark.parametrize("say", [None, one_for_all_layers, layer_kinds.types_by_config])
def test_only_layers_with_a_window_get_it(
    say: Callable[..., Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if say is not None:
        monkeypatch.setattr(layer_kinds, "get_layer_types_and_kwargs", say)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(num_hidden_layers=3, layer_types=types, sliding_window=WINDOW)
    kinds = LayerKinds.of(config, context=1024)
    assert kinds.attention == dict(enumerate(types))
    assert kinds.spans == {"sliding_attention": Span(WINDOW), "full_attention": Span()}
    assert LayerKinds.of(config, context=WINDOW).spans["sliding_attention"] == Span()


def test_states_are_found_by_layer() -> None:
    cache = SlotCache(LayerKinds({}, {}, frozenset({1})))
    cache.reserve(rows=3, length=8)
    cache.begin(slice(0, 2), torch.zeros(2, 1), end=1)
    assert cache.layers[1].conv_states == []
    cache.update_conv_state(torch.ones(2, 5, 1), 1, conv_kernel_size=4)
    cache.update_recurrent_state(torch.ones(2, 6), 1)
    layer = cache.layers[1]
    assert layer.record_past is False
    assert [tuple(state.shape) for state in (*layer.conv_states, *layer.recurrent_states)] == [
        (2, 5, 4),
        (2, 6),
    ]
    layer.conv_states[0].fill_(7)  # a convolution's kernel updates it in place
    assert (cache.get_conv_state(1) == 7).all()
    assert cache.layers[0].recurrent_states == []
