"""What layers keep of ended sequences, for prompts with the same beginning: the next turn of a conversation, the next
question after the same examples. Independent of batches and models.

Keys and values of all tokens serve any prompt that begins like the sequence, as far as it does. Recurrent states, and
windows that have moved on, stand for all of a sequence's tokens, and serve only prompts that begin with all of them.

What is kept of a token depends only on the tokens before it and the adapter. It is shared only among one tenant's
requests: otherwise the time to the first token would tell another tenant what has been asked before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

import numpy as np

from twinkle.protocol.types import Int64Array
from twinkle.server.samplers.transformers.cache import RowContents
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
    """

    owner: Owner
    tokens: Int64Array
    contents: RowContents


class PrefixCache:
    """The latest prefixes, up to a number of tokens."""

    def __init__(self, max_tokens: int, row_tokens: int = 0) -> None:
        """
        Args:
            row_tokens: what a prefix takes besides its tokens' keys and values, in tokens.
        """
        self._max_tokens = max_tokens
        self._row_tokens = row_tokens
        self._tokens = 0
        self._oldest_first: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._by_head: dict[tuple[Owner, bytes], list[CachedPrefix]] = {}
        self._removed: WeakSet[ResidentAdapter] = WeakSet()

    def __bool__(self) -> bool:
        return bool(self._oldest_first)

    def add(self, owner: Owner, tokens: Int64Array, contents: RowContents) -> None:
        """Keep a copy. If a prefix can be cut to another one, only the longer one is kept."""
        fits = len(tokens) >= MIN_PREFIX_TOKENS and len(tokens) + self._row_tokens <= self._max_tokens
        if owner[1] in self._removed or not fits:
            return
        alike = self._by_head.get(_head(owner, tokens), [])
        for other in list(alike):
            common = common_prefix_length(tokens, other.tokens)
            if common == len(tokens) and other.contents.usable(common) == common:
                self._oldest_first.move_to_end(other)
                return
            if common == len(other.tokens) and contents.usable(common) == common:
                self._drop(other)
        prefix = CachedPrefix(owner, tokens, contents.clone())
        self._oldest_first[prefix] = None
        self._by_head.setdefault(_head(owner, tokens), []).append(prefix)
        self._tokens += len(tokens) + self._row_tokens
        while self._tokens > self._max_tokens:
            self._drop(next(iter(self._oldest_first)))

    def lookup(self, owner: Owner, tokens: Int64Array) -> RowContents | None:
        """What is kept of the longest cached beginning."""
        best: CachedPrefix | None = None
        length = 0
        for prefix in self._by_head.get(_head(owner, tokens), []):
            common = prefix.contents.usable(common_prefix_length(tokens, prefix.tokens))
            if common > length:
                best, length = prefix, common
        if best is None:
            return None
        self._oldest_first.move_to_end(best)
        return best.contents.cut(length)

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
        self._tokens -= len(prefix.tokens) + self._row_tokens
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
