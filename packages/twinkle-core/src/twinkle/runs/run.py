"""A run: the steps of a training loop with a progress bar, what is logged, and what becomes of an interruption."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self, SupportsFloat, TypeVar, cast

from tqdm import tqdm

from twinkle.dataloader import DataLoader
from twinkle.protocol.errors import InvalidRequest
from twinkle.runs import records
from twinkle.runs.programs import takes_option
from twinkle.runs.records import RunState
from twinkle.runs.sinks import JsonLines, Sink, TensorBoard, WandB
from twinkle.verbs.futures import Pending
from twinkle.verbs.service import ServiceClientBase
from twinkle.verbs.training import TrainingClient

T = TypeVar("T")

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""

# Steps whose numbers may still be on their way while the next one begins: enough to keep a server busy, and few enough
# for the progress bar to tell what is done, and for Ctrl-C not to wait for long.
MAX_STEPS_AHEAD = 2


class Saves(Protocol):
    """The part of a training client that a run uses; Tinker's has it too."""

    def save_state(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Any: ...


class Run:
    """A training run seen from the client, and its folder.

        with Run("my-run", resume=args.resume) as run:
            client = run.create_training_client(service_client, base_model=MODEL, rank=16)
            for step, batch in run.steps(dataloader, client, epochs=2):
                passed = client.forward_backward(batch, "cross_entropy")
                client.optim_step(learning_rate=1e-4)
                run.log(loss=passed.then(lambda output: output.metrics["loss:sum"]))

    Ctrl-C lets the step that is under way end, saves, says how to go on, and ends the program; a second one ends it at
    once. A resumed run goes on with the batch after the last one that was trained. A loop that is left by `break` has
    come to its end.

    Args:
        name: of the run; its folder is `root/NAME-DATE-TIME`.
        root: folder of all runs.
        resume: the folder of a run to go on with, None for a new one.
        config: hyperparameters, kept in config.json.
        tensorboard: also write event files (`twinkle-core[tensorboard]`).
        wandb: project of Weights & Biases to log to as well (`twinkle-core[wandb]`).
        resume_option: option of the program that takes the folder, for the message that says how to go on. Where the
            program reads none, the message says what to write instead.

    Raises:
        NotFound: if there is nothing to resume in that folder.
        InvalidRequest: if a package is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str | os.PathLike[str] = "runs",
        resume: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        resume_option: str = "--resume",
    ) -> None:
        if not name or Path(name).name != name or name.startswith("."):
            raise InvalidRequest(f"name: {name!r} can't name a folder; use letters, digits, - and _")
        self.state: RunState | None = None
        """Where the run goes on, if it is a resumed one."""
        if resume is not None:
            self.directory = Path(resume)
            self.state = records.read_state(self.directory)
            records.keep_metrics_through(self.directory, self.state.step)
            if config is not None:
                _tell_differences(records.read_config(self.directory), records.as_json(config), resume_option)
        else:
            self.directory = _new_folder(Path(root), name)
            records.write_config(self.directory, config or {})
        """The run's folder."""
        self.step = 0 if self.state is None else self.state.step
        """Steps that are done; in a loop over `steps`, the number of the step under way, from 0."""
        self._in_step = False
        self._is_finished = False
        self._name = name
        self._resume_option = resume_option
        self._saves = 0
        self._sinks: list[Sink] = [JsonLines(self.directory)]
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}
        self._shown_step = -1
        if tensorboard:
            self._sinks.append(TensorBoard(self.directory))
        if wandb is not None:
            self._sinks.append(WandB(self.directory, wandb, config or {}))

    # ------------------------------------------------------------ steps

    def create_training_client(
        self, service_client: ServiceClientBase, base_model: str, **lora: Any
    ) -> TrainingClient:
        """A new adapter; or, in a resumed run, the one that goes on from the run's checkpoint, optimizer and all.

        Args:
            lora: rank, seed and so on, as `ServiceClient.create_lora_training_client` takes them.
        """
        if self.state is None:
            return service_client.create_lora_training_client(base_model, **lora)
        return service_client.create_training_client_from_state_with_optimizer(
            self.state.checkpoint, base_model
        )

    def steps(
        self,
        dataloader: DataLoader[T],
        training_client: Saves,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        save_every: int | None = None,
    ) -> Iterator[tuple[int, list[T]]]:
        """(number, batch) of each step that is still to be done, with a progress bar.

        Where a step logs something that is `Pending`, at most two steps are under way when the next one begins.

        Args:
            dataloader: where batches come from. On resuming it is put where it was.
            training_client: whose state is saved.
            epochs: passes over the data; None goes on until `max_steps`.
            max_steps: steps in all, those before an interruption included; None ends with the epochs.
            save_every: save the state each so many steps, so that a run can be resumed after a crash as well. Two
                checkpoints a run are kept, in turn.

        Raises:
            InvalidRequest: if neither limit is given, or the dataloader is not as it was.
        """
        self._put_in_place(dataloader, epochs, max_steps)
        total = _total(dataloader, epochs, max_steps)
        limit = math.inf if max_steps is None else max_steps
        bar = tqdm(total=total, initial=self.step, desc="training", unit="step")
        with bar, _deferred_interrupts() as interrupt:
            self._bar = bar
            for batch in _epochs(dataloader, epochs):
                if self.step >= limit:
                    break
                self._in_step = True
                try:
                    yield self.step, batch
                except GeneratorExit:  # the loop was left by `break`: that is its end
                    self._is_finished = True
                    raise
                self._in_step = False
                self.step += 1
                bar.update()
                self._write_what_is_there()
                while len(self._waiting) > MAX_STEPS_AHEAD:
                    self._write(*self._waiting.popleft())
                if interrupt.requested:
                    self._leave(training_client, dataloader)
                if save_every and self.step % save_every == 0:
                    self._save(training_client, dataloader)
            self._write_all()
            if interrupt.requested:
                self._leave(training_client, dataloader)
        self._bar = None
        self._is_finished = True

    def _put_in_place(self, dataloader: DataLoader[Any], epochs: int | None, max_steps: int | None) -> None:
        """Check what the loop is to go over, and move it to where a resumed run was."""
        if not isinstance(cast(object, dataloader), DataLoader):
            raise InvalidRequest(
                f"dataloader: {type(dataloader).__name__} is no DataLoader, whose place can be kept; to accumulate, "
                "let a batch of it be a whole step and cut that: accumulate(client, grouped(batch, size))"
            )
        if epochs is None and max_steps is None:
            raise InvalidRequest("epochs, max_steps: both are missing; say where the run ends")
        if self.state is not None:
            dataloader.load_state_dict(self.state.dataloader)
        elif epochs is not None and dataloader.epoch >= epochs:
            raise InvalidRequest(
                f"dataloader: it is in epoch {dataloader.epoch} already, so {epochs} epochs are over; make a new one"
            )

    def _save(self, training_client: Saves, dataloader: DataLoader[Any]) -> None:
        # Two names in turn: until state.json names the newer checkpoint, the older one is there.
        name = f"{self.directory.name}-{'ab'[self._saves % 2]}"
        self._saves += 1
        saved = training_client.save_state(name, overwrite=True).result()
        self.state = RunState(self.step, saved.path, dict(dataloader.state_dict()))
        records.write_state(self.directory, self.state)

    def _leave(self, training_client: Saves, dataloader: DataLoader[Any]) -> None:
        self._save(training_client, dataloader)
        if self._bar is not None:
            self._bar.close()
        self.close()
        print(f"\nInterrupted after step {self.step}; {self._how_to_go_on()}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)

    def _how_to_go_on(self) -> str:
        if self.state is None:
            return f"nothing was saved yet, so there is nothing to resume in {self.directory}."
        saved = f"the state after step {self.state.step} is saved as {self.state.checkpoint}.\n"
        if not takes_option(self._resume_option):
            return (
                f"{saved}To go on, give Run the folder and start again: Run({self._name!r}, "
                f"resume={str(self.directory)!r})"
            )
        arguments = _without_option(sys.argv[1:], self._resume_option)
        command = [sys.executable, sys.argv[0], *arguments, self._resume_option, str(self.directory)]
        return f"{saved}To go on: {shlex.join(command)}"

    # ------------------------------------------------------------ metrics

    def log(self, **metrics: SupportsFloat | Pending[float]) -> None:
        """Record numbers of the step that is under way, and show them beside the progress bar.

        A `Pending` is written when it is there, so that logging makes no loop wait. Steps are numbered from 1 in the
        records; what is logged before the first is of step 0, what is logged after the last is of the last.

        Raises:
            TwinkleError: if an earlier `Pending` failed.
            InvalidRequest: if something is no number.
        """
        self._waiting.append((self.step + self._in_step, dict(metrics)))
        self._write_what_is_there()

    def _write_what_is_there(self) -> None:
        while self._waiting and all(_is_there(value) for value in self._waiting[0][1].values()):
            self._write(*self._waiting.popleft())

    def _write_all(self) -> None:
        while self._waiting:
            self._write(*self._waiting.popleft())

    def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.write(step, numbers)
        if step != self._shown_step:  # numbers of an earlier step are not this one's
            self._shown, self._shown_step = {}, step
        self._shown |= {name: f"{value:.4g}" for name, value in numbers.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Write what is still waiting, and close the files. After all steps there is nothing left to resume.

        Raises:
            TwinkleError: if a `Pending` that was logged failed; the files are closed all the same.
        """
        try:
            self._write_all()
            if self._is_finished:
                (self.directory / records.STATE).unlink(missing_ok=True)
        finally:
            for sink in self._sinks:
                sink.close()
            self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        if self._sinks:  # not left by Ctrl-C already
            self._waiting.clear()  # most likely it is what failed
            self._is_finished = False
            self.close()
            if self._bar is not None:
                self._bar.close()
            print(f"\nEnded after step {self.step}; {self._how_to_go_on()}", file=sys.stderr)


class _Interrupt:
    """Whether Ctrl-C was pressed."""

    requested = False


@contextmanager
def _deferred_interrupts() -> Generator[_Interrupt]:
    """While the block runs, a first Ctrl-C is only noted; a second one raises KeyboardInterrupt as always.

    Outside of the main thread, where signals don't come, nothing changes.
    """
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        print("\nFinishing this step, then saving. Ctrl-C again ends at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _tell_differences(before: Mapping[str, Any], now: Mapping[str, Any], resume_option: str) -> None:
    """Warn of hyperparameters that are not as they were, but for the option that resumes."""
    own = resume_option.lstrip("-").replace("-", "_")
    names = [name for name in {**before, **now} if name != own and before.get(name) != now.get(name)]
    for name in names:
        print(
            f"resumed with another {name}: {before.get(name)!r} before, {now.get(name)!r} now",
            file=sys.stderr,
        )


def _epochs(dataloader: DataLoader[T], epochs: int | None) -> Iterator[list[T]]:
    """The batches of all epochs that are left."""
    while epochs is None or dataloader.epoch < epochs:
        yield from dataloader


def _total(dataloader: DataLoader[Any], epochs: int | None, max_steps: int | None) -> int | None:
    """Steps in all; None where the length of the data is not known."""
    try:
        in_epochs = None if epochs is None else epochs * len(dataloader)
    except TypeError:
        in_epochs = None
    known = [total for total in (in_epochs, max_steps) if total is not None]
    return min(known) if known else None


def _new_folder(root: Path, name: str) -> Path:
    """A folder of its own, also for two runs that begin in the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = root / f"{name}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InvalidRequest(f"root: can't make {folder} ({error.strerror or error})") from error
        return folder
    raise InvalidRequest(f"root: {root} has too many runs called {name} of this second")


def _is_there(value: object) -> bool:
    return not isinstance(value, Pending) or value.done()


def _number(name: str, value: object) -> float:
    value = cast(Pending[object], value).result() if isinstance(value, Pending) else value
    try:
        return float(cast(Any, value))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"log: {name} is {value!r:.80}; metrics are numbers") from error


def _without_option(arguments: Iterable[str], option: str) -> list[str]:
    """Command line arguments less one option and its value."""
    kept: list[str] = []
    skips = False
    for argument in arguments:
        if skips:
            skips = False
        elif argument == option:
            skips = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
