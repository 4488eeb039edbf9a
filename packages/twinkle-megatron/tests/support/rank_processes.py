"""A group of ranks in processes of their own, without Ray: what the server does with its actors, for tests.

The processes live as long as the group; backends on the loaded model are made and closed at will.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    Row,
    RowResult,
)

CALL_SECONDS = 180


@dataclass
class RankProcesses:
    """`with RankProcesses.start(config) as group: backend = group.backend()`."""

    processes: list[Any]
    pipes: list[Connection]
    config: ModelConfig
    made: int = field(default=0)

    @classmethod
    def start(cls, config: ModelConfig) -> RankProcesses:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["twinkle_megatron.backend"])  # imported once, forked from then on
        # Where the ranks meet: a file that isn't there yet, so that tests need no port.
        meeting = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "meeting")
        processes: list[Any] = []
        pipes: list[Connection] = []
        for rank in range(config.num_ranks):
            here, there = context.Pipe()
            own = replace(config, rank=rank, rendezvous=f"file://{meeting}")
            process = context.Process(target=_serve, args=(there, own), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        group = cls(processes, pipes, config)
        group._answers()
        return group

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
            process.join()

    def backend(self, config: ModelConfig | None = None) -> RemoteBackend:
        self.made += 1
        self.call("new", self.made, config or self.config)
        return RemoteBackend(self, self.made)

    def parameters_of_each_rank(self) -> list[tuple[int, int, int]]:
        """Elements that each rank holds, has read from files, and has read at once at most."""
        for pipe in self.pipes:
            pipe.send(("held", 0))
        return self._answers()

    def call(self, *message: Any) -> Any:
        """Every rank gets it; the first one's answer. What one refuses all refuse."""
        for pipe in self.pipes:
            pipe.send(message)
        return self._answers()[0]

    def _answers(self) -> list[Any]:
        answers: list[tuple[bool, Any]] = []
        for pipe in self.pipes:
            assert pipe.poll(CALL_SECONDS), "a rank does not answer"
            answers.append(pipe.recv())
        kinds = {type(answer) if failed else None for failed, answer in answers}
        assert len(kinds) == 1, f"ranks disagree: {answers}"
        failed, first = answers[0]
        if failed:
            raise first
        return [answer for _, answer in answers]


@dataclass
class RemoteBackend:
    """A `TrainingBackend` on a group."""

    group: RankProcesses
    number: int

    @property
    def info(self) -> BaseModelInfo:
        return self.group.call("get", self.number, "info")

    @property
    def loss_fns(self) -> LossSpecs:
        return self.group.call("get", self.number, "loss_fns")

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        self._call("add_adapter", adapter_id, spec)

    def remove_adapter(self, adapter_id: str) -> None:
        self._call("remove_adapter", adapter_id)

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        return self._call("forward_backward", micro_batches)

    def optim_step(self, steps: Sequence[AdamStep]) -> list[dict[str, float]]:
        return self._call("optim_step", steps)

    def export_adapter(
        self, adapter_id: str, with_optimizer: bool, with_gradients: bool = False
    ) -> AdapterState:
        return self._call("export_adapter", adapter_id, with_optimizer, with_gradients)

    def import_adapter(self, adapter_id: str, state: AdapterState) -> None:
        self._call("import_adapter", adapter_id, state)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *args: Any) -> Any:
        return self.group.call("do", self.number, method, *args)


def _serve(pipe: Connection, config: ModelConfig) -> None:
    """A rank: answers calls until it is told to stop."""
    import torch

    from twinkle_megatron import stage
    from twinkle_megatron.backend import MegatronBackend

    torch.set_num_threads(1)
    backends: dict[int, Any] = {}
    read = _watch_reading()
    try:
        loaded = stage.load(config)
        pipe.send((False, None))
    except Exception as error:
        pipe.send((True, error))
        return
    while (message := pipe.recv()) is not None:
        what, number, *args = message
        try:
            match what:
                case "new":
                    backends[number] = MegatronBackend(replace(args[0], rank=config.rank), loaded)
                    answer = None
                case "held":
                    held = sum(parameter.numel() for parameter in loaded.model.parameters())
                    answer = (held, sum(read), max(read))
                case "get":
                    answer = getattr(backends[number], args[0])
                case _:
                    answer = getattr(backends[number], args[0])(*args[1:])
            pipe.send((False, answer))
        except Exception as error:
            error.add_note(f"rank {config.rank}: {traceback.format_exc()}")
            pipe.send((True, error))


def _watch_reading() -> list[int]:
    """How many elements come out of safetensors each time that one is read."""
    from twinkle_megatron import weights

    read: list[int] = []

    class Watched:
        def __init__(self, tensor: Any) -> None:
            self._tensor = tensor

        def get_shape(self) -> list[int]:
            return self._tensor.get_shape()

        def __getitem__(self, index: Any) -> Any:
            part = self._tensor[index]
            read.append(part.numel())
            return part

    slices = weights._Checkpoint.slices
    weights._Checkpoint.slices = lambda self, name: Watched(slices(self, name))
    return read
