"""The engine's thread: admit who waits, draw a token for every row, take out who has ended; sleep when all have.

Models whose layers are all full attention run many requests in one batch. Others (sliding windows, the linear attention
of Qwen3.5) run one request at a time, its samples together: see `batches`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, Future
from typing import Self, TypeAlias

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.base_model import LoadedModel, copy_sharing_weights, load_base_model
from twinkle.server.backends.transformers.expert_lora import wrap_experts
from twinkle.server.backends.transformers.wrapped_linear import wrap_linears
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.batches import (
    PREFILL_TOKENS_BETWEEN,
    Batch,
    SingleBatch,
    make_batch,
)
from twinkle.server.samplers.transformers.draw import Uniforms
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RoutedLinear
from twinkle.server.samplers.transformers.network import Network, Prompt
from twinkle.server.samplers.transformers.next_tokens import NextTokens
from twinkle.server.samplers.transformers.patience import Patience
from twinkle.server.samplers.transformers.prompt_scores import check_targets
from twinkle.server.samplers.transformers.sequences import Sequence, Task
from twinkle.server.samplers.transformers.stops import is_stopped, load_tokenizer, stop_rule
from twinkle.server.samplers.transformers.trial import first_that_fits
from twinkle.server.samplers.waiting import Waiting, WaitingLine

log = logging.getLogger("twinkle.sampler")

# Sequences, and the logits [sequences, vocabulary] of the next token of each.
Drawable: TypeAlias = tuple[tuple[Sequence, ...], Tensor]

MAX_ROWS_CPU = 64
MAX_ROWS_GPU = 256
# Rows times their longest length, at most: what the cache may come to.
MAX_CACHED_TOKENS_CPU = 2**17
MAX_CACHED_TOKENS_GPU = 2**20
# Tokens of sequences that have ended, whose keys and values are kept for prompts that begin like them.
MAX_KNOWN_TOKENS = 2**14


class TransformersEngine:
    """See `twinkle.server.samplers.protocol.SamplingEngine`."""

    def __init__(self, loaded: LoadedModel, config: ModelConfig, max_rows: int | None = None) -> None:
        """
        Args:
            loaded: its weights are shared, not copied; its module tree is left as it is.
            max_rows: most sequences in the batch; by the device if None.
        """
        on_gpu = loaded.device.type == "cuda"
        model = copy_sharing_weights(loaded.model)
        route = Route()
        wrap_linears(model, loaded.linears, lambda base, name: RoutedLinear(base, name, route))
        wrap_experts(model, loaded.experts, route)
        self._loaded = loaded
        self._dtype = loaded.dtype
        self._network = Network(model, route)
        self._max_rows = max_rows or (MAX_ROWS_GPU if on_gpu else MAX_ROWS_CPU)
        self._max_tokens = MAX_CACHED_TOKENS_GPU if on_gpu else MAX_CACHED_TOKENS_CPU
        makers = (self._preferred_batch, lambda: SingleBatch(self._network))
        self._make_batch = makers[first_that_fits(loaded.model, makers)]
        self._batch = self._make_batch()
        self._tokenizer = load_tokenizer(config.path)
        self._adapters: dict[str, ResidentAdapter] = {}
        self._sequences: tuple[Sequence, ...] = ()  # row i of the batch is the i-th
        self._reading: dict[Prompt, Task] = {}  # whose prompts are on their way into the batch
        self._next_tokens = NextTokens()
        self._line: WaitingLine[Task] = WaitingLine()
        self._patience = Patience(PREFILL_TOKENS_BETWEEN)
        self._wake = (
            threading.Condition()
        )  # held wherever the line, patience or one of the three below is touched
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
                self._line.add(Waiting(request.tenant, task, task.longest, request.num_samples))
                self._patience.arrived(len(request.prompt), task.max_tokens)
                if request.request_id:
                    self._under_way.setdefault(request.request_id, set()).add(task)
                self._wake.notify()
        except (InvalidRequest, NotFound, ServerFault) as error:
            future.set_exception(error)
        return future

    def _accept(self, request: GenerateRequest, future: Future[SampleResponse]) -> Task:
        info = self._loaded.info
        if request.adapter_id is not None and request.adapter_id not in self._adapters:
            raise NotFound(f"adapter_id: {request.adapter_id!r} is not resident in the sampler")
        adapter = self._adapters[request.adapter_id] if request.adapter_id is not None else None
        if adapter is not None and not adapter.is_finite:
            raise InvalidRequest(
                f"adapter_id: {request.adapter_id!r} has weights that are not finite numbers, so its training has "
                "failed; sample a checkpoint from before"
            )
        length, limit = len(request.prompt), info.max_context_length
        if not 1 <= length <= limit:
            raise InvalidRequest(f"prompt: {length} tokens; this model takes 1 to {limit}")
        check_targets(request, info.vocab_size)
        # One token can be drawn after a prompt that fills the context: it is never read.
        room = max(1, limit - length)
        task = Task(
            request=request,
            future=future,
            adapter=adapter,
            stop=stop_rule(request.params, info.eos_token_ids, self._tokenizer is not None),
            max_tokens=min(request.params.max_tokens or room, room),
        )
        if request.params.seed is not None:
            task.seed = request.params.seed
        return task

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
        self._batch = self._make_batch()
        self._free_memory()
        self._end({task: error.with_traceback(None) for task in tasks})

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        return bool(self._line or self._sequences or self._reading or self._unwanted or self._gone)

    def _tasks(self) -> set[Task]:
        """Those in the batch, or on their way there."""
        return {*(sequence.task for sequence in self._sequences), *self._reading.values()}

    def _preferred_batch(self) -> Batch:
        return make_batch(self._network, self._max_rows, MAX_KNOWN_TOKENS)

    def _drop_unwanted(self) -> None:
        with self._wake:
            tasks, self._unwanted = self._unwanted, set()
            gone, self._gone = self._gone, []
        for adapter in gone:
            self._batch.forget_adapter(adapter)
        if tasks:
            self._end({task: CancelledError() for task in tasks})

    def _admit(self) -> None:
        """Who waits and may come in is read from now on; while others generate not before there is company, or soon."""
        one_at_a_time = isinstance(self._batch, SingleBatch)
        if one_at_a_time and (self._sequences or self._reading):
            return
        with self._wake:
            if not self._line or (self._sequences and not self._reading and not self._patience.is_over):
                return
            rows = self._batch.rows + sum(prompt.rows for prompt in self._reading)
            longest = max((task.longest for task in self._tasks()), default=0)
            taken = self._line.take(
                self._batch.max_rows - rows, longest, rows, self._max_tokens, 1 if one_at_a_time else None
            )
            self._patience.admitted(all_of_them=not self._line)
        prompts = {waiting.item.prompt(samples): waiting.item for waiting, samples in taken}
        self._reading |= prompts
        self._batch.add(list(prompts))

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
        """Prompts that can't be read together are read one by one; one that can't be read alone fails."""
        self._free_memory()
        reading, self._reading = self._reading, {}
        self._batch.forget(reading.keys())
        if len(reading) == 1:
            self._fail(next(iter(reading.values())), error)
            return None
        begun: list[Sequence] = []
        all_logits: list[Tensor] = []
        for prompt, task in reading.items():
            if task.future.done():
                continue
            try:
                logits = self._read_whole(task.prompt_again(prompt), task)
            except Exception as own_error:
                self._free_memory()
                self._fail(task, own_error)
            else:
                begun += self._sequences[len(self._sequences) - len(logits) :]
                all_logits.append(logits)
        return (tuple(begun), torch.cat(all_logits)) if begun else None

    def _read_whole(self, prompt: Prompt, task: Task) -> Tensor:
        """Read a prompt to its end, and begin its samples; returns their logits."""
        self._reading[prompt] = task
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
            task = self._reading.pop(prompt)
            task.note_prompt(prompt)
            for _ in range(prompt.rows):
                begun.append(Sequence(task, task.admitted, Uniforms(task.seed, task.admitted)))
                task.admitted += 1
        self._sequences += tuple(begun)
        return tuple(begun)

    def _step(self) -> Drawable | None:
        """One more token for everybody."""
        if not self._sequences:
            return None
        newest = [sequence.tokens[-1] for sequence in self._sequences]
        try:
            logits = self._batch.step(newest)
        except Exception as error:  # most likely memory: the newest request makes room for the others
            self._free_memory()
            self._fail(self._sequences[-1].task, error)
            return None
        with self._wake:
            self._patience.stepped()
        return self._sequences, logits

    def _advance(self, sequences: tuple[Sequence, ...], logits: Tensor) -> None:
        """Draw the next token of each sequence, and take out those that have ended."""
        self._next_tokens.append(sequences, logits)
        ended: set[Sequence] = set()
        for sequence in sequences:
            task = sequence.task
            stopped = is_stopped(task.stop, sequence.tokens, self._tokenizer)
            if stopped or len(sequence.tokens) >= task.max_tokens:
                task.finished[sequence.index] = sequence.result(stopped)
                ended.add(sequence)
                if task.is_complete:
                    self._forget(task)
                    task.succeed()
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
        unread = {prompt for prompt, task in self._reading.items() if task in errors}
        if unread:
            self._batch.forget(unread)
            self._reading = {prompt: task for prompt, task in self._reading.items() if prompt not in unread}
        self._drop({sequence for sequence in self._sequences if sequence.task in errors}, known=False)
        with self._wake:
            self._line.remove(errors.keys())

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
            tasks = {waiting.item for waiting in self._line.remove_all()}
        tasks |= self._tasks()
        self._end({task: CancelledError() for task in tasks})
        self._adapters.clear()
