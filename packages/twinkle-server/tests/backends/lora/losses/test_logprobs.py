import pytest
import torch
from torch import Tensor

from twinkle.server.backends.lora.losses.logprobs import chunked_logprobs

ROWS, TOKENS, HIDDEN, VOCAB = 3, 11, 5, 7


def full_logprobs(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets)


@pytest.mark.parametrize("positions", [1, 4, 10, 11, 100])
@pytest.mark.parametrize("k", [1, 3])
def test_chunks_equal_the_full_log_softmax_with_gradients(positions: int, k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=draw, requires_grad=True)
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, generator=draw, requires_grad=True)
    targets = torch.randint(0, VOCAB, (ROWS, TOKENS, k), generator=draw)
    upstream = torch.randn(ROWS, TOKENS, k, generator=draw)

    found = chunked_logprobs(lambda h, _: h @ weight.T, hidden, targets, VOCAB, ROWS * VOCAB * positions)
    found_grads = torch.autograd.grad((found * upstream).sum(), (weight, hidden))
    expected = full_logprobs(weight, hidden, targets)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), (weight, hidden))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grads, expected_grads)


def test_logits_are_never_held_for_more_than_a_chunk() -> None:
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN)
    sizes: list[int] = []

    def head(h: Tensor, first: int) -> Tensor:
        return h @ weight.T

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    targets = torch.zeros(ROWS, TOKENS, 1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = chunked_logprobs(head, hidden, targets, VOCAB, 2 * ROWS * VOCAB)
    assert max(sizes, default=0) <= 2 * ROWS * VOCAB
    found.sum().backward()
    assert hidden.grad is not None


def test_half_precision_logits_are_normalised_in_float32() -> None:
    hidden = torch.randn(1, 4, HIDDEN).bfloat16()
    weight = torch.randn(VOCAB, HIDDEN).bfloat16()
    targets = torch.arange(4).reshape(1, 4, 1)
    with torch.no_grad():
        found = chunked_logprobs(lambda h, _: h @ weight.T, hidden, targets, VOCAB)
    expected = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
