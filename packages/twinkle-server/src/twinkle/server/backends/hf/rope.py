"""Models whose rope depends on the length of what is computed.

Transformers chooses the frequencies of "longrope" (Phi-3, Phi-4) by the largest position of a whole call: the short
factors up to `original_max_position_embeddings` tokens, the long ones beyond. So rows on both sides of that boundary
must not share a call: some would get the others' numbers. (The frequencies of "dynamic" change too, but only beyond
`max_position_embeddings`, and no row here is longer.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from transformers import PretrainedConfig

# "su" is the name in the first Phi-3 configurations.
_BY_LENGTH = ("longrope", "su")


def rope_boundaries(config: PretrainedConfig, longest: int) -> tuple[int, ...]:
    """Lengths beyond which a row is computed with other frequencies, ascending; none for most models.

    Args:
        longest: most tokens of a row; boundaries beyond that are left out.
    """
    text: Any = config.get_text_config()
    found = {
        int(original)
        for parameters in _all_parameters(text)
        if parameters.get("rope_type", parameters.get("type")) in _BY_LENGTH
        and (
            original := parameters.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
        )
    }
    return tuple(sorted(boundary for boundary in found if boundary < longest))


def by_kind(boundaries: Sequence[int], lengths: Iterable[int]) -> list[list[int]]:
    """Which rows may share a call: their indices, grouped by the number of boundaries exceeded, in order."""
    kinds: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        kinds.setdefault(bisect_left(boundaries, length), []).append(row)
    return list(kinds.values())


def _all_parameters(text: Any) -> list[Mapping[str, Any]]:
    """The rope's parameters: of all layers, or of each type of layer."""
    found: list[Mapping[str, Any]] = []
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(text, name, None)
        if not isinstance(parameters, Mapping):
            continue
        values = list(cast("Mapping[str, Any]", parameters).values())
        nested = [cast("Mapping[str, Any]", value) for value in values if isinstance(value, Mapping)]
        found += nested or [cast("Mapping[str, Any]", parameters)]
    return found
