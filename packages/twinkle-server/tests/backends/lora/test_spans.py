import pytest
import torch

from twinkle.server.backends.lora import spans as spans_module
from twinkle.server.backends.lora.spans import Spans

COUNTS = [[7], [4, 4, 4], [5, 1, 8], [8, 8, 1]]
RANK = 3


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("features", [16, 5])
def test_each_token_is_multiplied_with_its_own_adapters_matrix(
    counts: list[int], is_small: bool, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans_module, "_SMALL", 2**15 if is_small else 0)
    spans = Spans.of(counts, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    x, out = torch.randn(2, sum(counts), features).unbind()
    a, b = torch.randn(2, len(counts), RANK, features).unbind()
    found = out.clone()
    low = spans.down(x, a)
    spans.add_up(found, low, b)
    outer = spans.outer(low, x)
    start = 0
    for i, count in enumerate(counts):
        own = slice(start, start + count)
        expected = x[own] @ a[i].T
        torch.testing.assert_close(found[own], out[own] + expected @ b[i])
        torch.testing.assert_close(outer[i], expected.T @ x[own])
        start += count


@pytest.mark.parametrize(
    ("start", "end", "adapters", "counts"),
    [
        (0, 14, slice(0, 3), (5, 1, 8)),
        (4, 6, slice(0, 2), (1, 1)),
        (5, 6, slice(1, 2), (1,)),
        (6, 9, slice(2, 3), (3,)),
        (2, 9, slice(0, 3), (3, 1, 3)),
    ],
)
def test_some_of_the_tokens_have_some_of_the_adapters(
    start: int, end: int, adapters: slice, counts: tuple[int, ...]
) -> None:
    assert Spans((5, 1, 8)).narrow(start, end) == (adapters, counts)
