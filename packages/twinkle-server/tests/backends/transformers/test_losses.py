import torch

from twinkle.server.backends.transformers.losses import cross_entropy


def test_cross_entropy_is_a_sum_with_weights_of_any_sign() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, -1.0, 2.0])
    loss = cross_entropy(logprobs, {"weights": weights}, {}).value
    assert loss.item() == 0.5 - 4.0 + 16.0
    loss.backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, -weights)
