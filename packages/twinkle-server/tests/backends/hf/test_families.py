"""Families of models: two tenants' rows of unlike length in one pass have PEFT's gradients of each alone, and PEFT
loads what is saved.

Every run looks at some of them, `scripts/hatch run families` at all.
"""

import os
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from adapter_files import peft_logprobs
from transformers import AutoModelForCausalLM

from twinkle.server.backends.contract.parts import assert_close
from twinkle.server.backends.lora import peft_format
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend

ALL = os.environ.get("TWINKLE_ALL_FAMILIES") == "1"
SPECS = {"a": AdapterSpec(rank=3, alpha=10.0, seed=1), "b": AdapterSpec(rank=2, seed=2)}


@pytest.mark.parametrize("name", families.FAMILIES if ALL else families.CHOSEN)
def test_a_family_trains_as_peft_does_alone_and_peft_loads_its_adapter(
    name: str,
    tmp_path: Path,
    random_row: Any,
    add_trained: Any,
    make_peft: Any,
    peft_parameters: Any,
    peft_loss: Any,
) -> None:
    model_dir = families.save(name, tmp_path / "model")
    backend = TransformersBackend(ModelConfig(model_dir))
    add_trained(backend, SPECS)
    lengths = {"a": (20, 40), "b": (5,)}
    rows: dict[str, list[Row]] = {
        who: [random_row(who, length, seed, vocab_size=128) for seed, length in enumerate(lengths[who])]
        for who in SPECS
    }
    [[result, *_]] = backend.forward_backward([[row for of_tenant in rows.values() for row in of_tenant]])
    for who in SPECS:
        state = backend.export_adapter(who, with_optimizer=False, with_gradients=True)
        model = make_peft(model_dir, state)
        peft_loss(model, rows[who]).backward()
        expected = {
            # An indexer's (DeepSeek V3.2) choice has no gradient.
            parameter_name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
            for parameter_name, p in peft_parameters(model).items()
        }
        assert state.gradients is not None
        assert_close(state.gradients, expected, 1e-4 if name in families.ROUGH else 1e-5)

    saved = tmp_path / "saved"
    saved.mkdir()
    state = backend.export_adapter("a", with_optimizer=False)
    peft_format.write(saved, state, str(model_dir), backend.info.export)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    plain, theirs = peft_logprobs(base, saved, rows["a"][0])
    assert (plain - theirs).abs().max() > 1e-3
    np.testing.assert_allclose(result.logprobs, theirs, atol=1e-4)
