"""Rows that are computed together are rows computed alone."""

import numpy as np
import pytest
import torch

from twinkle.protocol.types import Array
from twinkle.server.backends.lora.losses.formulas import FORMULAS, LOSS_SPECS
from twinkle.server.backends.lora.losses.row_losses import padded, row_losses, row_results
from twinkle.server.backends.protocol import Row


def make_row(
    loss_fn: str, shape: tuple[int, ...], seed: int, forward_only: bool = False, **config: float
) -> Row:
    draw = np.random.default_rng(seed)
    inputs: dict[str, Array] = {
        name: draw.normal(size=shape).astype(np.float32) for name in LOSS_SPECS[loss_fn].inputs
    }
    inputs["target_tokens"] = np.zeros(shape, np.int64)
    return Row("a", np.zeros(shape[0], np.int64), loss_fn, inputs, config, forward_only)


ROWS = [
    make_row("dro", (4,), 0),
    make_row("cross_entropy", (5, 3), 1),
    make_row("ppo", (7,), 2),
    make_row("dro", (2,), 3),
    make_row("ppo", (3,), 4, clip_low_threshold=0.1),
    make_row("gspo", (6,), 5),
    make_row("cross_entropy", (1,), 6),
    make_row("gspo", (2,), 7),
    make_row("importance_sampling", (3,), 8, forward_only=True),
    make_row("cispo", (4,), 9),
]


def test_losses_and_gradients_of_mixed_rows_are_the_formulas() -> None:
    torch.manual_seed(0)
    logprobs = -torch.rand(len(ROWS), 7, 3, dtype=torch.float64)
    logprobs.requires_grad_()
    losses = row_losses(ROWS, logprobs)
    losses.to_minimise(ROWS).backward()
    assert logprobs.grad is not None
    for i, (row, result) in enumerate(zip(ROWS, row_results(ROWS, logprobs, losses), strict=True)):
        shape = row.loss_inputs["target_tokens"].shape
        own = logprobs[i, : shape[0], : shape[1] if len(shape) == 2 else 1].detach().numpy().reshape(shape)
        config = {**LOSS_SPECS[row.loss_fn].config, **row.loss_config}
        value, gradient = FORMULAS[row.loss_fn](own, row.loss_inputs, config)
        assert result.loss == pytest.approx(value, rel=1e-6)
        assert np.array_equal(result.logprobs, own)
        expected = np.zeros((7, 3))
        if not row.forward_only:
            expected[: shape[0], : shape[1] if len(shape) == 2 else 1] = gradient.reshape(shape[0], -1)
        np.testing.assert_allclose(logprobs.grad[i], expected, rtol=1e-6, atol=1e-9)


def test_with_no_row_to_train_there_is_nothing_to_minimise() -> None:
    rows = [make_row("cross_entropy", (2,), 0, forward_only=True)]
    assert row_losses(rows, -torch.ones(1, 2, 1)).to_minimise(rows).item() == 0


def test_rows_are_padded_at_the_right() -> None:
    arrays = [np.array([1, 2], np.int64), np.array([[3, 4]], np.int64)]
    device = torch.device("cpu")
    assert padded(arrays, np.int64, device).tolist() == [[[1, 0], [2, 0]], [[3, 4], [0, 0]]]
    assert padded(arrays[:1], np.float32, device, (3, 1)).tolist() == [[[1.0], [2.0], [0.0]]]
