"""The kernels of `fused_logprobs`, run by Triton's interpreter, against torch's own log-softmax in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs triton, which comes with torch's builds for GPUs")

# In a process of its own: Triton looks at the variable when it is imported.
PROGRAM = """
import torch
from twinkle.server.backends.lora.losses import fused_logprobs
from twinkle.server.backends.lora.losses.fused_logprobs import FusedLogSoftmaxAt

fused_logprobs._BLOCK = 64
for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
    for tokens, vocab_size, k in ((1, 1, 1), (5, 64, 1), (3, 130, 2), (7, 200, 5)):
        torch.manual_seed(vocab_size)
        logits = (10 * torch.randn(tokens, vocab_size)).to(dtype)
        logits[0, -1] = float("-inf")  # a token that can't be drawn
        if vocab_size == 1:
            logits[0, 0] = 3.0
        targets = torch.randint(vocab_size, (tokens, k))
        targets[:, -1] = targets[:, 0]  # twice the same
        if vocab_size > 1:
            targets[0] = 0
        weights = torch.randn(tokens, k)

        exact = logits.double().requires_grad_()
        expected = exact.log_softmax(-1).gather(1, targets)
        (expected * weights).sum().backward()

        found_logits = logits.clone().requires_grad_()
        found = FusedLogSoftmaxAt.apply(found_logits * 1, targets)
        (found * weights).sum().backward()

        assert found.dtype == torch.float32 and found_logits.grad.dtype == dtype
        assert (found - expected).abs().max() <= 2e-5, (dtype, vocab_size)
        assert (found_logits.grad - exact.grad).abs().max() <= most * (1 + exact.grad.abs().max())
print("equal")
"""


def test_equal_to_torchs_log_softmax() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ran.stdout.strip() == "equal", ran.stderr[-3000:]
