"""What plain Transformers and PEFT compute for one adapter on its rows alone: the counterpart of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import AutoModelForCausalLM

from twinkle.server.backends.protocol import AdapterState, Row


def parameters(model: Any) -> dict[str, Any]:
    """A PEFT model's A and B, by their names in an adapter's state."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            target = name.replace(".base_layer", "")
            if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
                target += f".{module.parameter_name}"
            found[f"{target}.lora_A.weight"] = module.lora_A["default"].weight
            found[f"{target}.lora_B.weight"] = module.lora_B["default"].weight
    return found


def make(model_dir: Path, state: AdapterState) -> Any:
    """A PEFT model on a base model of its own, set to the weights of a state."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert state.spec.alpha.is_integer()
    modules = {name for name, _ in base.named_modules()}
    as_parameters = {name: name for name in state.target_modules if name not in modules}
    if any(name.endswith(".experts") for name in modules):
        # As target modules PEFT takes these for the routed experts' own.
        names = [
            name for name in state.target_modules if name.endswith(("gate_proj", "up_proj", "down_proj"))
        ]
        as_parameters |= {name: f"{name}.weight" for name in names if name in modules}
    config = LoraConfig(
        r=state.spec.rank,
        lora_alpha=int(state.spec.alpha),
        target_modules=[name for name in state.target_modules if name not in as_parameters],
        target_parameters=list(as_parameters.values()),
    )
    model = get_peft_model(base, config)
    found = parameters(model)
    assert set(found) == set(state.weights)
    for name, parameter in found.items():
        parameter.data.copy_(torch.from_numpy(state.weights[name]))
    return model


def logprobs(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities of the row's targets, float32 [T]; no padding."""
    logits = model(torch.from_numpy(row.tokens)[None]).logits[0]
    targets = torch.from_numpy(row.loss_inputs["target_tokens"])
    return torch.log_softmax(logits.float(), -1)[torch.arange(len(targets)), targets]


def loss(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Sum of -weight * log-probability over the rows, one row at a time."""
    total = torch.zeros(())
    for row in rows:
        total = total - (torch.from_numpy(row.loss_inputs["weights"]) * logprobs(model, row)).sum()
    return total


def random_row(adapter_id: str, length: int, seed: int, vocab_size: int = 512) -> Row:
    draw = np.random.default_rng(seed)
    inputs = {
        "target_tokens": draw.integers(0, vocab_size, length),
        "weights": draw.normal(size=length).astype(np.float32),
    }
    return Row(adapter_id, draw.integers(0, vocab_size, length), "cross_entropy", inputs)
