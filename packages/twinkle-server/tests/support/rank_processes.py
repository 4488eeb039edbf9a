"""A group of ranks in processes of their own, without Ray: what the server does with its actors, for tests.

The processes live as long as the group; backends on the loaded model are made and closed at will.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias

from twinkle.server.backends.protocol import (
    AdamStep,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
    LossSpecs,
    ModelConfig,
    Row,
    RowResult,
    TrainingBackend,
)
from twinkle.server.backends.shares import RankShares

CALL_SECONDS = 180


class Loaded(Protocol):
    """A rank's part of the model."""

    def backend(self, config: ModelConfig) -> TrainingBackend: ...

    def held(self) -> Any: ...


Load: TypeAlias = Callable[[ModelConfig], Loaded]


@dataclass
class RankProcesses:
    """`with RankProcesses.start(config, load) as group: backend = group.backend()`.

    Attributes:
        shares_rows: each rank gets rows of its own, as the server sends them.
    """

    processes: list[Any]
    pipes: list[Connection]
    config: ModelConfig
    shares_rows: bool
    made: int = field(default=0)

    @classmethod
    def start(
        cls, config: ModelConfig, load: Load, preload: Sequence[str], shares_rows: bool = False
    ) -> RankProcesses:
        """
        Args:
            load: a function of a module, called in each process.
            preload: modules that are imported once, and forked from then on.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        # Where the ranks meet: a file that isn't there yet, so that tests need no port.
        meeting = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "meeting")
        processes: list[Any] = []
        pipes: list[Connection] = []
        for rank in range(config.num_ranks):
            here, there = context.Pipe()
            own = replace(config, rank=rank, rendezvous=f"file://{meeting}")
            process = context.Process(target=_serve, args=(there, own, load), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        group = cls(processes, pipes, config, shares_rows)
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

    def held_by_each_rank(self) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(("held", 0))
        return self._answers()

    def call(self, *message: Any) -> Any:
        """Every rank gets it; the first one's answer. What one refuses all refuse."""
        return self.call_each([message] * len(self.pipes))[0]

    def call_each(self, messages: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Each rank gets its own; all answers."""
        for pipe, message in zip(self.pipes, messages, strict=True):
            pipe.send(message)
        return self._answers()

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
    """A `TrainingBackend` on a group.

    Attributes:
        owners: rank by adapter, where each rank gets rows of its own.
    """

    group: RankProcesses
    number: int
    owners: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def info(self) -> BaseModelInfo:
        return self.group.call("get", self.number, "info")

    @property
    def loss_fns(self) -> LossSpecs:
        return self.group.call("get", self.number, "loss_fns")

    def add_adapter(self, adapter_id: str, spec: AdapterSpec) -> None:
        self._call("add_adapter", adapter_id, spec)
        if self.group.shares_rows:
            self.owners[adapter_id] = self._call("owner_of", adapter_id)

    def remove_adapter(self, adapter_id: str) -> None:
        self._call("remove_adapter", adapter_id)

    def forward_backward(self, micro_batches: Sequence[Sequence[Row]]) -> list[list[RowResult]]:
        if not self.group.shares_rows:
            return self._call("forward_backward", micro_batches)
        shares = RankShares.of(micro_batches, len(self.group.pipes), 1, self.owners)
        calls = [("do", self.number, "forward_backward", share) for share in shares.of_ranks]
        return shares.put_together(self.group.call_each(calls))

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


def _serve(pipe: Connection, config: ModelConfig, load: Load) -> None:
    """A rank: answers calls until it is told to stop."""
    import torch

    torch.set_num_threads(1)
    backends: dict[int, Any] = {}
    try:
        loaded = load(config)
        pipe.send((False, None))
    except Exception as error:
        pipe.send((True, error))
        return
    while (message := pipe.recv()) is not None:
        what, number, *args = message
        try:
            match what:
                case "new":
                    backends[number] = loaded.backend(
                        replace(args[0], rank=config.rank, rendezvous=config.rendezvous)
                    )
                    answer = None
                case "held":
                    answer = loaded.held()
                case "get":
                    answer = getattr(backends[number], args[0])
                case _:
                    answer = getattr(backends[number], args[0])(*args[1:])
            pipe.send((False, answer))
        except Exception as error:
            error.add_note(f"rank {config.rank}: {traceback.format_exc()}")
            pipe.send((True, error))
