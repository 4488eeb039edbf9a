"""Independent counterparts in plain Transformers and PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from twinkle.server.backends.protocol import AdapterState, Row

torch.set_num_threads(1)

PeftMaker = Callable[[Path, AdapterState], Any]
LossOf = Callable[[Any, list[Row]], torch.Tensor]
RowMaker = Callable[..., Row]


@pytest.fixture
def make_peft() -> PeftMaker:
    """A PEFT model on a base model of its own, set to the weights of a state."""

    def make(model_dir: Path, state: AdapterState) -> Any:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        assert state.spec.alpha.is_integer()
        config = LoraConfig(
            r=state.spec.rank, lora_alpha=int(state.spec.alpha), target_modules=state.target_modules
        )
        model = get_peft_model(base, config)
        parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        assert set(parameters) == set(state.weights)
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(state.weights[name]))
        return model

    return make


@pytest.fixture
def peft_loss() -> LossOf:
    """Sum of -weight * log-probability over the rows, one row at a time, no padding."""

    def loss(model: Any, rows: list[Row]) -> torch.Tensor:
        total = torch.zeros(())
        for row in rows:
            logits = model(torch.from_numpy(row.tokens)[None]).logits[0]
            logprobs = torch.log_softmax(logits.float(), -1)
            targets = torch.from_numpy(row.loss_inputs["target_tokens"])
            weights = torch.from_numpy(row.loss_inputs["weights"])
            total = total - (weights * logprobs[torch.arange(len(targets)), targets]).sum()
        return total

    return loss


@pytest.fixture
def random_row() -> RowMaker:
    def make(adapter_id: str, length: int, seed: int, vocab_size: int = 512) -> Row:
        draw = np.random.default_rng(seed)
        inputs = {
            "target_tokens": draw.integers(0, vocab_size, length),
            "weights": draw.normal(size=length).astype(np.float32),
        }
        return Row(adapter_id, draw.integers(0, vocab_size, length), "cross_entropy", inputs)

    return make
