"""What each layer of a model keeps of a sequence: keys and values of all its tokens, of a window of them, or states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from transformers import PretrainedConfig, cache_utils

TypesAndSettings: TypeAlias = tuple[list[str], dict[str, Any] | list[dict[str, Any]]]

# What Transformers calls the mask of a layer's attention, by the layer's type.
_MASKS = {
    "full_attention": "full_attention",
    "sliding_attention": "sliding_attention",
    "chunked_attention": "chunked_attention",
    "hybrid": "full_attention",
    "hybrid_sliding": "sliding_attention",
}
_WITH_WINDOW = {"sliding_attention", "chunked_attention", "hybrid_sliding"}
_WITH_STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
# Feed-forward layers, and those that read another layer's keys and values.
_KEEPS_NOTHING = "dummy"


@dataclass(frozen=True)
class Span:
    """Which tokens up to its own a token's attention reads.

    Attributes:
        window: the last so many; None: all.
        is_chunked: instead, those of its own chunk: the sequence is cut into chunks of `window` tokens.
    """

    window: int | None = None
    is_chunked: bool = False


@dataclass(frozen=True)
class LayerKinds:
    """
    Attributes:
        spans: by the mask's name in Transformers.
        attention: by layer that keeps keys and values, the name of its mask.
        states: layers that keep states of constant size.
        unknown: why the layers can't be kept in rows of different lengths; empty if they can.
    """

    spans: dict[str, Span]
    attention: dict[int, str]
    states: frozenset[int] = frozenset()
    unknown: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig, context: int) -> LayerKinds:
        """
        Args:
            context: most tokens of a sequence; a window of that length has no effect.
        """
        text = config.get_text_config()
        can_slide = getattr(text, "use_sliding_window", True) is not False
        spans: dict[str, Span] = {}
        attention: dict[int, str] = {}
        states: set[int] = set()
        unknown = ""
        for layer, (kind, window) in enumerate(_types_and_windows(text)):
            if kind not in _MASKS and kind not in _WITH_STATES and kind != _KEEPS_NOTHING:
                unknown = f"layer {layer} is of the type {kind!r}, and what it keeps is not known here"
            if kind in _WITH_STATES:
                states.add(layer)
            if kind not in _MASKS:
                continue
            if window is not None and (window >= context or not can_slide):
                window = None
            mask = attention[layer] = _MASKS[kind]
            span = Span(window, window is not None and kind == "chunked_attention")
            if spans.setdefault(mask, span) != span:
                unknown = "its layers have windows of different lengths"
        return cls(spans, attention, frozenset(states), unknown)

    @property
    def can_go_back(self) -> bool:
        """Whether what is kept of a sequence includes what would be kept of each of its beginnings."""
        return not self.states and all(span.window is None for span in self.spans.values())


def types_by_config(text: PretrainedConfig) -> TypesAndSettings:
    """What `get_layer_types_and_kwargs` says, for Transformers before 5.16, which has no such function."""
    window, chunk = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    kind = "chunked_attention" if chunk else "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [kind] * cast(int, text.num_hidden_layers)
    own = len(types) - (getattr(text, "num_kv_shared_layers", None) or 0)
    return list(types[:own]), {"sliding_window": window or chunk}


get_layer_types_and_kwargs = getattr(cache_utils, "get_layer_types_and_kwargs", types_by_config)


def _types_and_windows(text: PretrainedConfig) -> list[tuple[str, int | None]]:
    """By layer; those at the end that read other layers' keys and values may be missing."""
    types, settings = cast(TypesAndSettings, get_layer_types_and_kwargs(text))
    if isinstance(settings, dict):  # in Transformers 5.17 and before: of all layers that have a window
        window = settings.get("sliding_window")
        return [(kind, window if kind in _WITH_WINDOW else None) for kind in types]
    return [(kind, more.get("sliding_window")) for kind, more in zip(types, settings, strict=True)]
