"""Which beginnings are kept, for whom, and for how long."""

from __future__ import annotations

import numpy as np
import torch

from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.prefix_cache import PrefixCache, common_prefix_length

ADA = ("ada", None)
BOB = ("bob", None)


def tokens(*parts: tuple[int, int]) -> np.ndarray:
    """Each part is a token, so many times."""
    return np.concatenate([np.full(n, token, np.int64) for token, n in parts])


def contents(n: int, value: float = 0.0) -> list[torch.Tensor]:
    return [torch.full((1, n, 2), value)]


def adapter() -> ResidentAdapter:
    return ResidentAdapter((1, ()), {}, {}, {}, True)


def test_common_beginnings_are_counted_from_16_tokens_on():
    assert common_prefix_length(tokens((1, 30)), tokens((1, 20), (2, 10))) == 20
    assert common_prefix_length(tokens((1, 30)), tokens((1, 30), (2, 10))) == 30
    assert common_prefix_length(tokens((1, 16)), tokens((1, 16))) == 16
    assert common_prefix_length(tokens((1, 15), (3, 9)), tokens((1, 15), (2, 9))) == 0
    assert common_prefix_length(tokens((1, 15)), tokens((1, 15))) == 0


def test_the_longest_known_beginning_is_found_for_its_owner_alone():
    kept = PrefixCache(1000)
    kept.add(ADA, tokens((1, 40), (2, 10)), contents(50, 1.0))
    kept.add(ADA, tokens((1, 20), (3, 10)), contents(30, 2.0))
    length, found = kept.lookup(ADA, tokens((1, 40), (4, 9)))
    assert length == 40 and found[0].eq(1.0).all()
    length, found = kept.lookup(ADA, tokens((1, 20), (3, 5), (9, 5)))
    assert length == 25 and found[0].eq(2.0).all()
    other = ("ada", adapter())
    assert kept.lookup(BOB, tokens((1, 40)))[0] == kept.lookup(other, tokens((1, 40)))[0] == 0


def test_what_is_kept_is_a_copy_and_the_longest_of_what_begins_alike():
    kept = PrefixCache(1000)
    written = contents(20, 1.0)
    kept.add(ADA, tokens((1, 20)), written)
    written[0].zero_()
    assert kept.lookup(ADA, tokens((1, 20)))[1][0].eq(1.0).all()
    kept.add(ADA, tokens((1, 30)), contents(30, 2.0))
    kept.add(ADA, tokens((1, 25)), contents(25, 3.0))
    length, found = kept.lookup(ADA, tokens((1, 100)))
    assert length == 30 and found[0].eq(2.0).all()


def test_the_least_recently_used_goes_when_there_are_too_many_tokens():
    kept = PrefixCache(70)
    for token in (1, 2):
        kept.add(ADA, tokens((token, 30)), contents(30))
    assert kept.lookup(ADA, tokens((1, 30)))[0] == 30
    kept.add(ADA, tokens((3, 30)), contents(30))
    assert [kept.lookup(ADA, tokens((token, 30)))[0] for token in (1, 2, 3)] == [30, 0, 30]
    kept.add(ADA, tokens((4, 71)), contents(71))
    assert kept.lookup(ADA, tokens((4, 71)))[0] == 0 and kept.lookup(ADA, tokens((3, 30)))[0] == 30


def test_an_adapter_that_goes_takes_its_own_along():
    kept = PrefixCache(1000)
    first, second = adapter(), adapter()
    for one in (first, second):
        kept.add(("ada", one), tokens((1, 30)), contents(30))
    kept.forget(first)
    assert kept.lookup(("ada", first), tokens((1, 30)))[0] == 0
    assert kept.lookup(("ada", second), tokens((1, 30)))[0] == 30
    kept.clear()
    assert not kept and kept.lookup(("ada", second), tokens((1, 30)))[0] == 0
