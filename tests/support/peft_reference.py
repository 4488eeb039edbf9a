"""What Transformers, PEFT and torch say on their own, for tests to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from twinkle.protocol.types import Datum, ModelInput

MODEL = "Qwen/Qwen3.5-4B"
VOCAB = 512


def random_batch(seed: int, lengths: tuple[int, ...]) -> list[Datum]:
    rng = np.random.default_rng(seed)
    batch = []
    for length in lengths:
        tokens = rng.integers(0, VOCAB, length + 1)
        weights = rng.choice([0.0, 1.0, 0.5, -0.25], length).astype(np.float32)
        batch.append(
            Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    return batch


def peft_model(hub_root: Path, directory: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(hub_root / MODEL, dtype=torch.float32)
    return PeftModel.from_pretrained(base, directory, is_trainable=True).eval()


def peft_logprobs(model: PeftModel, datum: Datum) -> torch.Tensor:
    tokens = torch.tensor(datum.model_input.to_ints())[None]
    logits = model(input_ids=tokens).logits[0]
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].tolist())
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


def peft_loss(model: PeftModel, batch: list[Datum]) -> torch.Tensor:
    """-sum of weight x log-probability, over all tokens of all sequences."""
    losses = [
        -(torch.tensor(datum.loss_fn_inputs["weights"].tolist()) * peft_logprobs(model, datum)).sum()
        for datum in batch
    ]
    return torch.stack(losses).sum()


def trained_parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
