"""An adapter trained on a tiny model, and what PEFT computes with its files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft_alone
import tiny_moe
import torch
from peft import PeftModel

from twinkle.protocol.types import AdamParams
from twinkle.server.backends.protocol import AdamStep, AdapterSpec, AdapterState, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend

ROW = peft_alone.random_row("a", 20, 0, tiny_moe.SIZES["vocab_size"])


def trained(model_dir: Path, spec: AdapterSpec) -> tuple[TransformersBackend, AdapterState, Any]:
    """A backend with an adapter "a" after two steps, the adapter, and the row's log-probabilities under it."""
    backend = TransformersBackend(ModelConfig(model_dir))
    backend.add_adapter("a", spec)
    for _ in range(2):
        backend.forward_backward([[ROW]])
        backend.optim_step([AdamStep("a", AdamParams(learning_rate=0.05))])
    [[after]] = backend.forward_backward([[ROW]])
    return backend, backend.export_adapter("a", with_optimizer=True), after.logprobs


def peft_logprobs(base: Any, adapter: Path, row: Row = ROW) -> tuple[Any, Any]:
    """The row's log-probabilities, of the base model and with the adapter."""
    with torch.no_grad():
        plain = peft_alone.logprobs(base, row)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # what PEFT says of matrices that it misses
            if base.config.get_text_config().tie_word_embeddings:
                warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")
            peft = PeftModel.from_pretrained(base, adapter)
        return plain, peft_alone.logprobs(peft, row)
