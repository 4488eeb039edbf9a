"""The engine's thread: admit who waits, draw a token for every row, take out who has ended; sleep when all have.

Memory is taken as sequences grow. Where it runs out, or another tenant has no place at all, some are paused (`places`):
they stand in line again, and are read again when there is room, with the tokens that they have.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Self, TypeAlias

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.hf.base_model import LoadedModel, copy_sharing_weights, load_base_model
from twinkle.server.backends.lora.experts import wrap_experts
from twinkle.server.backends.lora.linear import wrap_linears
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.load import Load
from twinkle.server.samplers.places import FOR_NEWCOMERS, Held, to_make_room, to_shrink
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.batches import (
    PREFILL_TOKENS_BETWEEN,
    Batch,
    lockstep_batch,
    make_batch,
)
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.limits import make_limits
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RoutedLinear
from twinkle.server.samplers.transformers.memory import is_out_of_memory
from twinkle.server.samplers.transformers.network import Network, Prompt
from twinkle.server.samplers.transformers.next_tokens import NextTokens
from twinkle.server.samplers.transformers.patience import Patience
from twinkle.server.samplers.transformers.sequences import Item, Sequence, Task, make_task, task_of, waiting
from twinkle.server.samplers.transformers.stops import is_stopped, load_tokenizer
from twinkle.server.samplers.transformers.trial import first_that_fits
from twinkle.server.samplers.waiting import WaitingLine

log = logging.getLogger("twinkle.sampler")

# Sequences, and the logits [sequences, vocabulary] of the next token of each.
Drawable: TypeAlias = tuple[tuple[Sequence, ...], Tensor]

# Tokens of sequences that have ended, whose keys and values are kept for prompts that begin like them.
MAX_KNOWN_TOKENS = 2**14


class TransformersEngine:
    """See `twinkle.server.samplers.protocol.SamplingEngine`."""

    def __init__(
        self,
        loaded: LoadedModel,
        config: ModelConfig,
        max_rows: int | None = None,
        max_cached_tokens: int | None = None,
    ) -> None:
        """
        Args:
            loaded: its weights are shared, not copied; its module tree is left as it is.
            max_rows: most sequences in the batch; by the device if None.
            max_cached_tokens: most tokens whose keys and values are kept of running sequences, and the longest that any
                may become; by device, context and free memory if None.
        """
        model = copy_sharing_weights(loaded.model)
        route = Route()
        wrap_linears(model, loaded.linears, lambda base, name: RoutedLinear(base, name, route))
        wrap_experts(model, loaded.experts, route)
        self._loaded = loaded
        self._dtype = loaded.dtype
        self._network = Network(model, route)
        self._limits = make_limits(loaded, max_rows, max_cached_tokens)
        makers = (self._preferred_batch, lambda: lockstep_batch(self._network, self._limits))
        self._make_batch = makers[first_that_fits(loaded.model, makers)]
        self._batch = self._make_batch()
        self._tokenizer = load_tokenizer(config.path)
        self._adapters: dict[str, ResidentAdapter] = {}
        self._sequences: tuple[Sequence, ...] = ()  # row i of the batch is the i-th
        self._reading: dict[Prompt, Item] = {}  # whose prompts are on their way into the batch
        self._is_full = False  # memory has run out, and nothing has ended since
        self._next_tokens = NextTokens()
        self._line: WaitingLine[Item] = WaitingLine()
        self._accepted = 0
        self._patience = Patience(PREFILL_TOKENS_BETWEEN)
        # Held wherever the line, patience or one of the three below is touched.
        self._wake = threading.Condition()
        self._under_way: dict[str, set[Task]] = {}  # by request id, those that can be cancelled
        self._unwanted: set[Task] = set()  # cancelled, not taken out yet
        self._gone: list[ResidentAdapter] = []  # removed, not forgotten by the batch yet
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    @classmethod
    def create(cls, config: ModelConfig, backend: TrainingBackend) -> Self:
        if isinstance(backend, TransformersBackend):
            return cls(backend.loaded, config)
        # However many ranks train it, the model that samples is whole, on this rank's device.
        return cls(load_base_model(ModelConfig(config.path, config.torch_dtype, config.device)), config)

    # ------------------------------------------------------------ called from other threads

    def resident_adapters(self) -> list[str]:
        """Ids of the adapters that can be sampled."""
        with self._wake:
            return list(self._adapters)

    def add_adapter(self, adapter_id: str, state: AdapterState) -> None:
        with self._wake:
            if adapter_id in self._adapters:
                return
        adapter = ResidentAdapter.of(state, self._dtype, self._loaded.device)
        with self._wake:
            self._adapters.setdefault(adapter_id, adapter)

    def remove_adapter(self, adapter_id: str) -> None:
        with self._wake:
            adapter = self._adapters.pop(adapter_id, None)  # tasks that use it hold it until they are done
            if adapter is not None:
                self._gone.append(adapter)
                self._wake.notify()

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        future: Future[SampleResponse] = Future()
        future.set_running_or_notify_cancel()  # only the engine ends it from here on
        try:
            with self._wake:
                if self._closed:
                    raise ServerFault("the sampling engine has been closed")
                task = self._accept(request, future)
                self._line.add(waiting(task, request.num_samples))
                self._patience.arrived(len(request.prompt), task.max_tokens)
                if request.request_id:
                    self._under_way.setdefault(request.request_id, set()).add(task)
                self._wake.notify()
        except (InvalidRequest, NotFound, ServerFault) as error:
            future.set_exception(error)
        return future

    def _accept(self, request: GenerateRequest, future: Future[SampleResponse]) -> Task:
        if request.adapter_id is not None and request.adapter_id not in self._adapters:
            raise NotFound(f"adapter_id: {request.adapter_id!r} is not resident in the sampler")
        adapter = self._adapters[request.adapter_id] if request.adapter_id is not None else None
        self._accepted += 1
        has_tokenizer = self._tokenizer is not None
        return make_task(
            request, future, adapter, self._accepted, self._loaded.info, self._limits.tokens, has_tokenizer
        )

    def cancel(self, request_id: str) -> None:
        """The request ends with `CancelledError` before the next step."""
        with self._wake:
            self._unwanted |= self._under_way.get(request_id, set())
            self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # ------------------------------------------------------------ the engine's own thread

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception as error:  # not one sample's fault: without this thread all would wait for ever
                log.exception("the sampling engine starts over: %s", error)
                self._start_over(error)
        self._abandon()

    def _turn(self) -> None:
        """Read a piece of the prompts of those who may come in, then a step for everybody; what comes of either gives
        those concerned their next token.
        """
        self._drop_unwanted()
        self._admit()
        for work in (self._read, self._step):
            drawable = work()
            if drawable is None:
                continue
            try:
                self._advance(*drawable)
            except Exception as error:
                for task in {sequence.task for sequence in drawable[0]}:
                    self._fail(task, error)

    def _start_over(self, error: Exception) -> None:
        """Nobody knows what state the batch is in: who is in it fails, and a new one is begun. Who waits may come."""
        tasks = self._tasks()
        self._sequences = ()
        self._reading = {}
        try:
            self._batch = self._make_batch()
            self._free_memory()
        except Exception:  # a device that has failed fails here too; then the next one to come is told so
            log.exception("the sampling engine could not start over")
        finally:
            self._end({task: error.with_traceback(None) for task in tasks})

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        return bool(self._line or self._sequences or self._reading or self._unwanted or self._gone)

    def _tasks(self) -> set[Task]:
        """Those in the batch, or on their way there."""
        return {*(sequence.task for sequence in self._sequences), *map(task_of, self._reading.values())}

    def _preferred_batch(self) -> Batch:
        return make_batch(self._network, self._limits, MAX_KNOWN_TOKENS, self._loaded.info.max_context_length)

    def _drop_unwanted(self) -> None:
        with self._wake:
            tasks, self._unwanted = self._unwanted, set()
            gone, self._gone = self._gone, []
        for adapter in gone:
            self._batch.forget_adapter(adapter)
        if tasks:
            self._end({task: CancelledError() for task in tasks})

    def _held(self) -> list[Held]:
        """The batch's rows in order, then the samples on their way there."""
        held = [Held(s.task.request.tenant, s.order, s.length) for s in self._sequences]
        for prompt, item in self._reading.items():
            order = item.order if isinstance(item, Sequence) else (item.number, item.admitted)
            held += [Held(prompt.tenant, order, len(prompt.tokens), can_pause=False)] * prompt.rows
        return held

    def _admit(self) -> None:
        """Who waits and may come in is read from now on; while others generate not before there is company, or soon."""
        self._is_full &= bool(self._sequences or self._reading)
        with self._wake:
            if not self._line or (self._sequences and not self._reading and not self._patience.is_over):
                return
            running = {task.request.tenant for task in self._tasks()}
            newcomers = [tenant for tenant in self._line.tenants() if tenant not in running]
        if self._is_full:
            return
        for tenant in newcomers if running else []:
            self._make_room_for(tenant)
        self._take_in()
        with self._wake:
            self._patience.admitted(all_of_them=not self._line)

    def _make_room_for(self, tenant: str) -> None:
        """Nothing of this tenant runs: others make room, and it takes it."""
        limits = self._batch.limits
        with self._wake:
            length, samples = self._line.wants(tenant)
        paused = to_make_room(self._held(), limits, length, samples)
        self._pause({self._sequences[row] for row in paused}, known=True)
        self._take_in(max(1, limits.rows // FOR_NEWCOMERS), tenant, may_fill=True)

    def _take_in(self, most: int | None = None, only: str | None = None, may_fill: bool = False) -> None:
        """Begin to read who finds a place: see `WaitingLine.take`."""
        limits = self._batch.limits
        rows = len(self._sequences) + sum(prompt.rows for prompt in self._reading)
        if rows >= limits.rows:
            return
        load = Load.of(limits, (one.length for one in self._held()))
        with self._wake:
            taken = self._line.take(load, most, only, may_fill)
        prompts = {
            one.item.prompt_again() if isinstance(one.item, Sequence) else one.item.prompt(samples): one.item
            for one, samples in taken
        }
        self._reading |= prompts
        self._batch.add(list(prompts))

    def _pause(self, sequences: AbstractSet[Sequence], known: bool) -> None:
        """Sequences leave the batch, and come before everything else of their tenants when there is room.

        Args:
            known: whether their keys and values may be kept until then, as far as those of ended ones are.
        """
        if not sequences:
            return
        self._drop(sequences, known)
        with self._wake:
            for sequence in sorted(sequences, key=lambda one: one.order, reverse=True):
                self._line.put_back(waiting(sequence, 1))

    def _read(self) -> Drawable | None:
        """Read on; returns the sequences that begin, with their logits."""
        if not self._reading:
            return None
        try:
            prompts, logits = self._batch.read()
        except Exception as error:
            return self._read_singly(error)
        return (self._begin(prompts), logits) if prompts else None

    def _read_singly(self, error: Exception) -> Drawable | None:
        """Prompts that can't be read together are read one by one; one that can't be read alone fails, or waits for
        others to end if memory is what it lacks.
        """
        self._free_memory()
        reading, self._reading = self._reading, {}
        self._batch.forget(reading.keys())
        if len(reading) == 1:
            self._not_read(*next(iter(reading.items())), error)
            return None
        begun: list[Sequence] = []
        all_logits: list[Tensor] = []
        for prompt, item in reading.items():
            task = task_of(item)
            if task.future.done():
                continue
            try:
                logits = self._read_whole(task.prompt_again(prompt), item)
            except Exception as own_error:
                self._free_memory()
                self._not_read(prompt, item, own_error)
            else:
                begun += self._sequences[len(self._sequences) - len(logits) :]
                all_logits.append(logits)
        # A later one that failed has taken the samples of its request out.
        left = set(self._sequences)
        kept = [row for row, sequence in enumerate(begun) if sequence in left]
        return (tuple(begun[row] for row in kept), torch.cat(all_logits)[kept]) if kept else None

    def _not_read(self, prompt: Prompt, item: Item, error: Exception) -> None:
        """A prompt could not be read alone."""
        unread = {one for one, other in self._reading.items() if other is item}
        self._batch.forget(unread)
        self._reading = {one: other for one, other in self._reading.items() if one not in unread}
        if not (self._sequences and is_out_of_memory(error)):
            self._fail(task_of(item), error)
            return
        self._is_full = True
        if isinstance(item, Task):
            item.take_back(prompt)
        with self._wake:
            self._line.put_back(replace(waiting(item, prompt.rows), tokens=0))

    def _read_whole(self, prompt: Prompt, item: Item) -> Tensor:
        """Read a prompt to its end, and begin its samples; returns their logits."""
        self._reading[prompt] = item
        self._batch.add([prompt])
        read: list[Prompt] = []
        logits = torch.empty(0)
        while not read:
            read, logits = self._batch.read()
        self._begin(read)
        return logits

    def _begin(self, prompts: list[Prompt]) -> tuple[Sequence, ...]:
        """Sequences for the rows that were just made, prompt by prompt."""
        begun: list[Sequence] = []
        for prompt in prompts:
            item = self._reading.pop(prompt)
            if isinstance(item, Sequence):
                begun.append(item)  # it goes on
                continue
            item.note_prompt(prompt)
            for _ in range(prompt.rows):
                begun.append(Sequence(item, item.admitted, Uniforms(item.seed, item.admitted)))
                item.admitted += 1
        self._sequences += tuple(begun)
        return tuple(begun)

    def _step(self) -> Drawable | None:
        """One more token for everybody."""
        self._read_again()
        self._shrink()
        if not self._sequences:
            return None
        newest = [sequence.tokens[-1] for sequence in self._sequences]
        try:
            logits = self._batch.step(newest)
        except Exception as error:
            self._not_stepped(error)
            return None
        with self._wake:
            self._patience.stepped()
        return self._sequences, logits

    def _read_again(self) -> None:
        """What the batch keeps of some is no use for their next tokens: they are read from their beginnings."""
        rows = self._batch.to_read_again()
        if rows:
            sequences = [self._sequences[row] for row in rows]
            self._drop(set(sequences), known=False)
            prompts: dict[Prompt, Item] = {sequence.prompt_again(): sequence for sequence in sequences}
            self._reading |= prompts
            self._batch.add(list(prompts))

    def _shrink(self) -> None:
        """Pause some if the next step of all would take more memory than there is."""
        limits = self._batch.limits
        if not self._reading and self._batch.rows * self._batch.longest <= limits.tokens:
            return  # as nearly always
        held = self._held()
        while Load.of(limits, (one.length for one in held)).is_too_much:
            row = to_shrink(held)
            if row is None:
                return
            self._pause({self._sequences[row]}, known=True)
            held = self._held()

    def _not_stepped(self, error: Exception) -> None:
        """Where memory has run out, somebody is paused until another has ended; else the newest request fails."""
        self._free_memory()
        row = to_shrink(self._held()) if is_out_of_memory(error) else None
        if row is None:
            self._fail(max(self._sequences, key=lambda sequence: sequence.order).task, error)
            return
        log.info("memory ran out: a sample is paused (%s)", error)
        self._is_full = True
        self._pause({self._sequences[row]}, known=False)

    def _advance(self, sequences: tuple[Sequence, ...], logits: Tensor) -> None:
        """Draw the next token of each sequence, and take out those that have ended."""
        self._next_tokens.append(sequences, logits)
        ended: set[Sequence] = set()
        for sequence in sequences:
            task = sequence.task
            stopped = is_stopped(task.stop, sequence.tokens, self._tokenizer, task.request.prompt)
            if stopped or len(sequence.tokens) >= task.max_tokens:
                task.finished[sequence.index] = sequence.result(stopped)
                ended.add(sequence)
                if task.is_complete:
                    self._forget(task)
                    task.succeed()
        self._is_full &= not ended
        self._drop(ended, known=True)

    def _drop(self, ended: AbstractSet[Sequence], known: bool) -> None:
        """Take sequences out.

        Args:
            known: whether later prompts may begin like them; not if their adapter has gone meanwhile.
        """
        rows = [row for row, sequence in enumerate(self._sequences) if sequence in ended]
        if not rows:
            return
        adapters = self._adapters
        known_rows = {
            row
            for row in rows
            if known
            and (task := self._sequences[row].task).adapter is adapters.get(task.request.adapter_id or "")
        }
        self._sequences = tuple(self._sequences[old] for old in self._batch.drop(rows, known_rows))

    def _fail(self, task: Task, error: Exception) -> None:
        log.warning("a sample failed: %s", error)
        self._end({task: error.with_traceback(None)})  # without the frames that hold its tensors

    def _end(self, errors: Mapping[Task, BaseException]) -> None:
        """Tasks leave batch and line with an error each; the others go on."""
        for task, error in errors.items():
            self._forget(task)
            task.fail(error)
        unread = {prompt for prompt, item in self._reading.items() if task_of(item) in errors}
        if unread:
            self._batch.forget(unread)
            self._reading = {prompt: item for prompt, item in self._reading.items() if prompt not in unread}
        self._drop({sequence for sequence in self._sequences if sequence.task in errors}, known=False)
        self._is_full = False  # those who wait may find room now
        with self._wake:
            self._line.remove(lambda item: task_of(item) in errors)

    def _forget(self, task: Task) -> None:
        """It can't be cancelled any more."""
        with self._wake:
            request_id = task.request.request_id
            others = self._under_way.get(request_id, set()) - {task}
            if others:
                self._under_way[request_id] = others
            else:
                self._under_way.pop(request_id, None)

    def _free_memory(self) -> None:
        self._batch.free_memory()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _abandon(self) -> None:
        """The engine was closed: whatever is not done is cancelled."""
        with self._wake:
            tasks = {task_of(one.item) for one in self._line.remove_all()}
        tasks |= self._tasks()
        self._end({task: CancelledError() for task in tasks})
        self._adapters.clear()
