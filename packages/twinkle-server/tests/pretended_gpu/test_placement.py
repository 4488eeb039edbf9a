"""Tensors in the wrong place: what the pretended GPU catches. `pytest --pretend-cuda` runs these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_cuda.counts import Counts

from twinkle.server.backends.lora import scratch
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend, passes

pytestmark = pytest.mark.usefixtures("device_counts")

MIXED = r"tensors on cuda:0, and on the CPU those of shape .*; at .*/"


def row(adapter_id: str) -> Row:
    tokens = np.arange(1, 9)
    return Row(
        adapter_id, tokens, "cross_entropy", {"target_tokens": tokens, "weights": np.ones(8, np.float32)}
    )


@pytest.fixture
def backend(tiny_model_dir: Path) -> TransformersBackend:
    backend = TransformersBackend(ModelConfig(tiny_model_dir))
    for adapter_id in ("one", "other", "third"):
        backend.add_adapter(adapter_id, AdapterSpec(rank=4))
    return backend


# Uneven, so that rows' adapters are looked up by an index.
ROWS = [row(adapter_id) for adapter_id in ("one", "one", "third")]


def test_models_and_adapters_are_on_the_device(backend: TransformersBackend) -> None:
    assert {parameter.device.type for parameter in backend.loaded.model.parameters()} == {"cuda"}
    assert {place.device.type for place in backend._adapters["one"].bank.params.values()} == {"cuda"}
    assert np.isfinite(backend.forward_backward([ROWS])[0][0].loss)


def test_targets_left_on_the_cpu_are_caught(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = passes.padded
    calls: list[Any] = []

    def left_behind(arrays: Any, dtype: Any, device: torch.device, *size: Any) -> torch.Tensor:
        calls.append(arrays)
        is_targets = len(calls) == 2  # after the tokens
        return original(arrays, dtype, torch.device("cpu") if is_targets else device, *size)

    monkeypatch.setattr(passes, "padded", left_behind)
    with pytest.raises(RuntimeError, match=MIXED + r"logprobs\.py"):
        backend.forward_backward([ROWS])


def test_an_index_made_on_the_cpu_is_caught(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_rows", lambda members, device: torch.tensor(members))
    with pytest.raises(RuntimeError, match=MIXED + r"linear\.py"):
        backend.forward_backward([ROWS])


def test_a_device_is_refused_by_numpy_and_beside_tensors_of_the_cpu() -> None:
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert there.device == torch.device("cuda", 0) and here.device.type == "cpu"
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor: .*\[3\]"):
        torch.add(here, there)
    with pytest.raises(RuntimeError, match="aten.index.Tensor"):
        here[there.long()]
    with pytest.raises(RuntimeError, match="aten.cat"):
        torch.cat([here, there])
    # A GPU takes scalars of the CPU.
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]


def test_gradients_are_where_their_tensors_are() -> None:
    x = torch.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    (x.square() * x).sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == "cuda"
    assert x.grad.tolist() == [3, 12]


@pytest.mark.parametrize(
    ("does", "waits"),
    [
        (lambda there: there + 1, 0),
        (lambda there: there[1:].view(-1), 0),
        (lambda there: there[torch.tensor([0], device="cuda")], 1),  # for the index
        (lambda there: there[torch.tensor([0])], 1),
        (lambda there: there[there > 0], 1),
        (lambda there: there.nonzero(), 1),
        (lambda there: bool(there.any()), 1),
        (lambda there: there.cpu(), 1),
        (lambda there: torch.zeros(2).to("cuda", non_blocking=True), 1),
        (lambda there: torch.zeros(2).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda there: torch.zeros(2).pin_memory().to("cuda"), 1),
        (lambda there: there.to("cpu", non_blocking=True), 0),
        (lambda there: there.copy_(torch.zeros(2)), 1),
        (lambda there: there.repeat_interleave(2), 0),
        (lambda there: there.repeat_interleave(torch.ones(2, dtype=torch.int64, device="cuda")), 1),
        (lambda there: torch.cuda.synchronize(), 1),
    ],
)
def test_waits_are_counted(device_counts: Counts, does: Any, waits: int) -> None:
    there = torch.tensor([1.0, 2.0], device="cuda")
    with device_counts.of() as found:
        does(there)
    assert found.waits.total() == waits, found.waits
