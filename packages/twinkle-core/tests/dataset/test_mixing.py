"""The order in which rows of several sources come: by weights, seeded, each once."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle.dataset import Dataset, IterableDataset
from twinkle.dataset.mixing import mix
from twinkle.protocol.errors import InvalidRequest


def dataset_of(*counts: int) -> Dataset:
    dataset = Dataset()
    for source, count in enumerate(counts):
        rows = Dataset.from_rows([{"source": source, "n": n} for n in range(count)])
        dataset._sources += rows._sources
    return dataset


def pairs(dataset: Any) -> list[tuple[int, int]]:
    return [(row["source"], row["n"]) for row in dataset]


def test_rows_are_drawn_in_proportion_to_the_weights() -> None:
    counts = [0, 0, 0]
    for source, _ in pairs(dataset_of(9000, 9000, 9000).mix_dataset(weights=[6, 3, 1]))[:10_000]:
        counts[source] += 1
    # Standard deviations of a binomial of 10,000 draws are below 50.
    assert [round(count / 10_000, 1) for count in counts] == [0.6, 0.3, 0.1]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_row_comes_once_and_sources_stay_in_order(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.01, 10)) for _ in counts]
    mixed = pairs(dataset_of(*counts).mix_dataset(weights=weights, seed=seed))
    for source, count in enumerate(counts):
        assert [n for each, n in mixed if each == source] == list(range(count))
    first = pairs(dataset_of(*counts).mix_dataset(weights=weights, seed=seed, stop="first_exhausted"))
    assert mixed[: len(first)] == first
    if len(first) < len(mixed):
        assert any(first.count((source, count - 1)) or count == 0 for source, count in enumerate(counts))


def test_the_order_depends_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[int]:
        return [source for source, _ in pairs(dataset_of(6, 6).mix_dataset(weights=[1, 2], seed=seed))]

    assert drawn(5) == drawn(5) != drawn(6)
    # Written down once: it must be the same on every machine and with every numpy.
    assert drawn(5) == [1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0]


def test_a_drawn_number_is_what_the_mersenne_twister_is_defined_to_give() -> None:
    # Doubles of 53 bits out of two words each (genrand_res53 of its authors), compared with the first weight's share.
    words = np.random.MT19937(np.random.SeedSequence([5])).random_raw(200).tolist()
    doubles = [
        ((high >> 5) * 2**26 + (low >> 6)) / 2**53 for high, low in zip(*[iter(words)] * 2, strict=True)
    ]
    mixed = pairs(dataset_of(200, 200).mix_dataset(weights=[1, 2], seed=5))
    assert [source for source, _ in mixed[:100]] == [int(double * 3 >= 1) for double in doubles]


def test_the_first_exhausted_source_ends_the_turns() -> None:
    assert pairs(dataset_of(1, 3).mix_dataset(stop="first_exhausted")) == [(0, 0), (1, 0)]
    assert pairs(dataset_of(3, 1).mix_dataset(stop="first_exhausted")) == [(0, 0), (1, 0), (0, 1)]
    assert pairs(dataset_of(2, 2).mix_dataset(stop="first_exhausted")) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_source_of_weight_zero_is_never_drawn_from() -> None:
    assert pairs(dataset_of(3, 3).mix_dataset(weights=[0, 1])) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "weights: 1 for 2 sources"),
        ({"weights": [1, 1, 1]}, "weights: 3 for 2 sources"),
        ({"weights": [1, -1]}, r"weights\[1\]: -1"),
        ({"weights": [float("nan"), 1]}, r"weights\[0\]: nan"),
        ({"weights": [1, float("inf")]}, r"weights\[1\]: inf"),
        ({"weights": [0, 0.0]}, "weights: all are 0"),
        ({"weights": [1, 1], "seed": -1}, "seed: -1"),
        ({"stop": "never"}, "stop: 'never'; allowed are all_exhausted, first_exhausted"),
        ({"interleave": False, "weights": [1, 1]}, "give neither weights nor stop"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        dataset_of(1, 1).mix_dataset(**options)


def test_streams_are_mixed_as_datasets_are() -> None:
    streams = [IterableDataset.from_rows([{"source": s, "n": n} for n in range(9)]) for s in range(3)]
    assert pairs(IterableDataset.mix(streams)) == pairs(dataset_of(9, 9, 9).mix_dataset())
    mixed = IterableDataset.mix(streams, weights=[1, 2, 3], seed=4)
    assert sorted(pairs(mixed)) == sorted(pairs(dataset_of(9, 9, 9)))
    epochs = [pairs(mixed.epoch(number)) for number in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    with pytest.raises(InvalidRequest, match="weights: 1 for 3 sources"):
        IterableDataset.mix(streams, weights=[1])


def test_no_row_is_read_before_its_turn() -> None:
    read: list[str] = []

    def source(name: str) -> Any:
        for n in range(5):
            read.append(f"{name}{n}")
            yield f"{name}{n}"

    taken = mix([source("x"), source("y")], [1, 1], [0], "all_exhausted")
    for count in range(1, 6):
        assert next(taken) == read[-1]
        assert len(read) == count
