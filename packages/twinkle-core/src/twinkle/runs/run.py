"""A run: the steps of a training loop with a progress bar, logging, and resuming after interruptions."""

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
"""Exit code after Ctrl-C."""

# Steps that may be in flight when the next one begins: enough to keep a server busy, and few enough that the progress
# bar shows what is done and Ctrl-C doesn't wait for long.
MAX_STEPS_AHEAD = 2


class Saves(Protocol):
    """The part of a training client that a run uses, which Tinker's has too."""

    def save_state(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Any: ...


class Run:
    """A training run on the client's side, and its folder.

        with Run("my-run", resume=args.resume) as run:
            client = run.create_training_client(service_client, base_model=MODEL, rank=16)
            for step, batch in run.steps(dataloader, client, epochs=2):
                passed = client.forward_backward(batch, "cross_entropy")
                client.optim_step(learning_rate=1e-4)
                run.log(loss=passed.then(lambda output: output.metrics["loss:sum"]))

    Ctrl-C lets the current step finish, saves, prints how to resume, and ends the program; a second one ends it at
    once. A resumed run continues with the batch after the last one trained. Leaving the loop by `break` counts as
    finishing the run.

    Args:
        name: of the run; its folder is `root/NAME-DATE-TIME`.
        root: folder of all runs.
        resume: the folder of a run to resume; default: a new run.
        config: hyperparameters, saved in config.json.
        tensorboard: also write event files (`twinkle-core[tensorboard]`).
        wandb: Weights & Biases project to log to as well (`twinkle-core[wandb]`).
        resume_option: the program's option for the folder, for the message on how to resume. If the program reads none,
            the message says what to write instead.

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
        """Where the run resumes, if it does."""
        if resume is not None:
            self.directory = Path(resume)
            self.state = records.read_state(self.directory)
            # Steps after the last checkpoint are trained, and logged, again.
            records.keep_metrics_through(self.directory, self.state.step)
            if config is not None:
                _tell_differences(records.read_config(self.directory), records.as_json(config), resume_option)
        else:
            self.directory = _new_folder(Path(root), name)
            records.write_config(self.directory, config or {})
        """The run's folder."""
        self.step = 0 if self.state is None else self.state.step
        """Finished steps; in a loop over `steps`, the number of the current step, from 0."""
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
        """A client for a new adapter; or, in a resumed run, for the run's checkpoint, optimizer included.

        Args:
            lora: rank, seed and so on, as for `ServiceClient.create_lora_training_client`.
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
        """Yield (number, batch) of each remaining step, with a progress bar.

        If steps log `Pending` values, at most two steps are in flight when the next one begins.

        Args:
            dataloader: source of the batches; its position is restored on resuming.
            training_client: the client whose state is saved.
            epochs: passes over the data; default: until `max_steps`.
            max_steps: total steps, including those before an interruption; default: until the end of the epochs.
            save_every: also save the state every so many steps, to be able to resume after a crash. A run keeps two
                checkpoints, alternately overwritten.

        Raises:
            InvalidRequest: if neither limit is given, or the dataloader differs from the interrupted run's.
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
                except GeneratorExit:  # the loop was left by `break`, which ends it
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
        """Check the dataloader, and restore its position in a resumed run."""
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
        # Two alternating names: the older checkpoint exists until state.json names the newer one.
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
        """Record metrics of the current step, and show them beside the progress bar.

        A `Pending` is written once it is done, so logging never blocks the loop. Steps are numbered from 1 in the
        records; metrics logged before the first belong to step 0, those after the last to the last.

        Raises:
            TwinkleError: if an earlier `Pending` failed.
            InvalidRequest: if a value is not a number.
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
        if step != self._shown_step:  # don't show an earlier step's metrics as this one's
            self._shown, self._shown_step = {}, step
        self._shown |= {name: f"{value:.4g}" for name, value in numbers.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Write pending metrics, and close the files. After all steps there is nothing left to resume.

        Raises:
            TwinkleError: if a logged `Pending` failed; the files are closed all the same.
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
        if self._sinks:  # unless Ctrl-C is ending it already
            self._waiting.clear()  # most likely the same failure
            self._is_finished = False
            self.close()
            if self._bar is not None:
                self._bar.close()
            print(f"\nEnded after step {self.step}; {self._how_to_go_on()}", file=sys.stderr)


class _Interrupt:
    """Set once Ctrl-C was pressed."""

    requested = False


@contextmanager
def _deferred_interrupts() -> Generator[_Interrupt]:
    """While the block runs, the first Ctrl-C is only noted; a second one raises KeyboardInterrupt as usual.

    Does nothing outside the main thread, which doesn't receive signals.
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
    """Warn of hyperparameters that have changed, except the one that resumes."""
    own = resume_option.lstrip("-").replace("-", "_")
    names = [name for name in {**before, **now} if name != own and before.get(name) != now.get(name)]
    for name in names:
        print(
            f"resumed with another {name}: {before.get(name)!r} before, {now.get(name)!r} now",
            file=sys.stderr,
        )


def _epochs(dataloader: DataLoader[T], epochs: int | None) -> Iterator[list[T]]:
    """The batches of all remaining epochs."""
    while epochs is None or dataloader.epoch < epochs:
        yield from dataloader


def _total(dataloader: DataLoader[Any], epochs: int | None, max_steps: int | None) -> int | None:
    """Total steps; None if the length of the data is unknown."""
    try:
        in_epochs = None if epochs is None else epochs * len(dataloader)
    except TypeError:
        in_epochs = None
    known = [total for total in (in_epochs, max_steps) if total is not None]
    return min(known) if known else None


def _new_folder(root: Path, name: str) -> Path:
    """A new folder, unique even for runs that begin in the same second."""
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
    """Command line arguments without one option and its value."""
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
