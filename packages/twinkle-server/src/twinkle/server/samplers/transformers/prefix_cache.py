"""Keys and values of ended sequences, for prompts with the same beginning: the next turn of a conversation, the next
question after the same examples. Independent of batches and models.

A token's keys and values depend only on the tokens before it and the adapter. They are shared only among one tenant's
requests: otherwise the time to the first token would tell another tenant what has been asked before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

import numpy as np
from torch import Tensor

from twinkle.protocol.types import Int64Array
from twinkle.server.samplers.transformers.lora import ResidentAdapter

# Owner of keys and values: a tenant, an adapter as it was made, and the number of rope boundaries that the whole
# sequence is beyond (which changes all of its keys).
Owner: TypeAlias = tuple[str, ResidentAdapter | None, *tuple[int, ...]]

# Fewer common tokens are faster computed again than looked up and copied.
MIN_PREFIX_TOKENS = 16


@dataclass(eq=False)
class CachedPrefix:
    """
    Attributes:
        tokens: int64 [n].
        contents: see `SlotCache.row`.
    """

    owner: Owner
    tokens: Int64Array
    contents: list[Tensor]


class PrefixCache:
    """The latest prefixes, up to a number of tokens."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._oldest_first: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._by_head: dict[tuple[Owner, bytes], list[CachedPrefix]] = {}
        self._removed: WeakSet[ResidentAdapter] = WeakSet()

    def __bool__(self) -> bool:
        return bool(self._oldest_first)

    def add(self, owner: Owner, tokens: Int64Array, contents: list[Tensor]) -> None:
        """Keep a copy. If one of two prefixes begins with the other, only the longer one is kept."""
        if owner[1] in self._removed or not MIN_PREFIX_TOKENS <= len(tokens) <= self._max_tokens:
            return
        alike = self._by_head.get(_head(owner, tokens), [])
        for other in list(alike):
            common = common_prefix_length(tokens, other.tokens)
            if common == len(tokens):
                self._oldest_first.move_to_end(other)
                return
            if common == len(other.tokens):
                self._drop(other)
        prefix = CachedPrefix(owner, tokens, [content.clone() for content in contents])
        self._oldest_first[prefix] = None
        self._by_head.setdefault(_head(owner, tokens), []).append(prefix)
        self._tokens += len(tokens)
        while self._tokens > self._max_tokens:
            self._drop(next(iter(self._oldest_first)))

    def lookup(self, owner: Owner, tokens: Int64Array) -> tuple[int, list[Tensor]]:
        """The longest cached beginning: its length, and contents at least that long; 0 if there is none."""
        best, contents = 0, list[Tensor]()
        for prefix in self._by_head.get(_head(owner, tokens), []):
            common = common_prefix_length(tokens, prefix.tokens)
            if common > best:
                best, contents = common, prefix.contents
                self._oldest_first.move_to_end(prefix)
        return best, contents

    def forget(self, adapter: ResidentAdapter) -> None:
        """The adapter was removed: nothing would use its keys and values."""
        self._removed.add(adapter)
        for prefix in [prefix for prefix in self._oldest_first if prefix.owner[1] is adapter]:
            self._drop(prefix)

    def clear(self) -> None:
        self._oldest_first.clear()
        self._by_head.clear()
        self._tokens = 0

    def _drop(self, prefix: CachedPrefix) -> None:
        del self._oldest_first[prefix]
        self._tokens -= len(prefix.tokens)
        head = _head(prefix.owner, prefix.tokens)
        self._by_head[head].remove(prefix)
        if not self._by_head[head]:
            del self._by_head[head]


def common_prefix_length(left: Int64Array, right: Int64Array) -> int:
    """Length of two sequences' common beginning; 0 if shorter than `MIN_PREFIX_TOKENS`."""
    n = min(len(left), len(right))
    if n < MIN_PREFIX_TOKENS or (left[:MIN_PREFIX_TOKENS] != right[:MIN_PREFIX_TOKENS]).any():
        return 0
    different = left[:n] != right[:n]
    return int(different.argmax()) if different.any() else n


def _head(owner: Owner, tokens: Int64Array) -> tuple[Owner, bytes]:
    return owner, np.ascontiguousarray(tokens[:MIN_PREFIX_TOKENS]).tobytes()
