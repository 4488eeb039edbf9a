"""Which beginnings are kept, for whom, and for how long."""

from __future__ import annotations

import numpy as np
import torch

from twinkle.server.samplers.transformers.cache import Name, RowContents
from twinkle.server.samplers.transformers.lora import ResidentAdapter
from twinkle.server.samplers.transformers.prefix_cache import Owner, PrefixCache, common_prefix_length

ADA = ("ada", None)
BOB = ("bob", None)


def tokens(*parts: tuple[int, int]) -> np.ndarray:
    """Each part is a token, so many times."""
    return np.concatenate([np.full(n, token, np.int64) for token, n in parts])


KEYS: Name = ("keys", 0, 0)
STATE: Name = ("recurrent", 1, 0)


def contents(n: int, value: float = 0.0, state: float | None = None) -> RowContents:
    """Keys of n tokens, and a state if given."""
    states = {} if state is None else {STATE: torch.full((2,), state)}
    return RowContents(n, {KEYS: torch.full((1, n, 2), value)}, states)


def found(kept: PrefixCache, owner: Owner, tokens: np.ndarray) -> tuple[int, float]:
    """The length of what is kept of a beginning, and the keys' value; 0, 0 if there is none."""
    contents = kept.lookup(owner, tokens)
    if contents is None:
        return 0, 0.0
    keys = contents.keys_values[KEYS]
    assert keys.shape == (1, contents.length, 2) and keys.eq(keys[0, 0, 0]).all()
    return contents.length, keys[0, 0, 0].item()


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
    assert found(kept, ADA, tokens((1, 40), (4, 9))) == (40, 1.0)
    assert found(kept, ADA, tokens((1, 20), (3, 5), (9, 5))) == (25, 2.0)
    other = ("ada", adapter())
    assert kept.lookup(BOB, tokens((1, 40))) is kept.lookup(other, tokens((1, 40))) is None


def test_what_is_kept_is_a_copy_and_the_longest_of_what_begins_alike():
    kept = PrefixCache(1000)
    written = contents(20, 1.0)
    kept.add(ADA, tokens((1, 20)), written)
    written.keys_values[KEYS].zero_()
    assert found(kept, ADA, tokens((1, 20))) == (20, 1.0)
    kept.add(ADA, tokens((1, 30)), contents(30, 2.0))
    kept.add(ADA, tokens((1, 25)), contents(25, 3.0))
    assert found(kept, ADA, tokens((1, 100))) == (30, 2.0)


def test_the_least_recently_used_goes_when_there_are_too_many_tokens():
    kept = PrefixCache(70)
    for token in (1, 2):
        kept.add(ADA, tokens((token, 30)), contents(30))
    assert found(kept, ADA, tokens((1, 30)))[0] == 30
    kept.add(ADA, tokens((3, 30)), contents(30))
    assert [found(kept, ADA, tokens((token, 30)))[0] for token in (1, 2, 3)] == [30, 0, 30]
    kept.add(ADA, tokens((4, 71)), contents(71))
    assert found(kept, ADA, tokens((4, 71)))[0] == 0 and found(kept, ADA, tokens((3, 30)))[0] == 30


def test_an_adapter_that_goes_takes_its_own_along():
    kept = PrefixCache(1000)
    first, second = adapter(), adapter()
    for one in (first, second):
        kept.add(("ada", one), tokens((1, 30)), contents(30))
    kept.forget(first)
    assert found(kept, ("ada", first), tokens((1, 30)))[0] == 0
    assert found(kept, ("ada", second), tokens((1, 30)))[0] == 30
    kept.clear()
    assert not kept and found(kept, ("ada", second), tokens((1, 30)))[0] == 0


def test_states_serve_only_what_begins_with_all_of_their_tokens():
    kept = PrefixCache(1000)
    kept.add(ADA, tokens((1, 20)), contents(20, 1.0, state=5.0))
    kept.add(ADA, tokens((1, 30)), contents(30, 2.0, state=6.0))
    assert [found(kept, ADA, tokens((1, n))) for n in (19, 20, 29, 30, 99)] == [
        (0, 0.0), (20, 1.0), (20, 1.0), (30, 2.0), (30, 2.0),
    ]  # fmt: skip
    hits = [kept.lookup(ADA, tokens((1, n))) for n in (25, 35)]
    states = [hit.states[STATE] for hit in hits if hit is not None]
    assert [state.tolist() for state in states] == [[5.0, 5.0], [6.0, 6.0]]


def test_windows_that_have_moved_on_serve_only_what_begins_with_all_of_their_tokens():
    kept = PrefixCache(1000)
    kept.add(ADA, tokens((1, 30)), RowContents(30, {KEYS: torch.ones(1, 16, 2)}))
    assert kept.lookup(ADA, tokens((1, 29))) is None
    longer = kept.lookup(ADA, tokens((1, 31)))
    assert longer is not None and longer.length == 30


def test_what_is_kept_of_a_sequence_besides_its_tokens_counts():
    kept = PrefixCache(100, row_tokens=20)
    for token in (1, 2, 3):
        kept.add(ADA, tokens((token, 30)), contents(30, state=1.0))
    assert [found(kept, ADA, tokens((token, 30)))[0] for token in (1, 2, 3)] == [0, 30, 30]
    kept.add(ADA, tokens((4, 81)), contents(81, state=1.0))
    assert kept.lookup(ADA, tokens((4, 81))) is None
