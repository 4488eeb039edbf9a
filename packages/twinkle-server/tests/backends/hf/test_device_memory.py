"""How the memory beside the weights is divided, with a GPU's free memory pretended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twinkle.server.backends.hf import device_memory
from twinkle.server.backends.hf.device_memory import MemoryAccount, giving_memory_back, is_out_of_memory
from twinkle.server.backends.protocol import ModelConfig

FREE = 100 * 10**9
CONFIG = ModelConfig(Path("model"), device="cuda")
GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (FREE, 141 * 10**9))
    monkeypatch.setattr(device_memory, "_free_host_memory", lambda: FREE)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize(("trains", "samples"), [(True, True), (True, False), (False, True)])
def test_the_parts_are_together_no_more_than_is_free(device: str, trains: bool, samples: bool) -> None:
    config = replace(CONFIG, trains=trains, samples=samples)
    account = MemoryAccount.of(config, torch.device(device))
    parts = (account.adapters, account.passes, account.sampling)
    assert 0.7 * FREE < sum(parts) < 0.95 * FREE
    assert [part > 0 for part in parts] == [trains, trains, samples]


def test_who_is_alone_has_the_others_part_too() -> None:
    both, training, sampling = (
        MemoryAccount.of(replace(CONFIG, trains=trains, samples=samples), GPU)
        for trains, samples in ((True, True), (True, False), (False, True))
    )
    assert sampling.sampling == pytest.approx(both.adapters + both.passes + both.sampling, abs=3)
    assert training.adapters + training.passes == pytest.approx(sampling.sampling, abs=3)
    assert training.passes / training.adapters == pytest.approx(both.passes / both.adapters)


def test_ranks_on_cpus_share_one_memory_and_those_on_gpus_have_one_each() -> None:
    for device, sharers in (("cpu", 4), ("cuda", 1)):
        one, four = (
            MemoryAccount.of(replace(CONFIG, data_parallel_size=ranks), torch.device(device))
            for ranks in (1, 4)
        )
        assert four.passes == pytest.approx(one.passes / sharers, abs=1)


def test_a_pass_of_all_adapters_there_may_be_leaves_room_for_activations() -> None:
    """An adapter's number takes 16 bytes in its bank, and a gradient, a stack and two copies in a pass (float32)."""
    account = MemoryAccount.of(CONFIG, GPU)
    in_a_pass = account.adapters // 16 * (4 + 4 + 4)
    assert account.passes - in_a_pass > 0.5 * account.passes


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_is_told_from_worse(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_is_free_again_when_it_has_run_out() -> None:
    held = torch.zeros(1000)
    freed: list[bool] = []

    class Watched:
        def __del__(self) -> None:
            freed.append(True)

    def allocate() -> None:
        watched = Watched()
        raise RuntimeError(f"can't allocate memory: {len(held)}, {type(watched)}")

    def allocate_more() -> None:
        allocate()

    with pytest.raises(MemoryError, match="can't allocate memory: 1000"):
        try:
            giving_memory_back(torch.device("cpu"), allocate_more)
        finally:
            assert freed, "the frames of what has failed are still held"
