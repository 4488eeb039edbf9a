"""The Transformers sampling engine: continuous batching with chunked prefill, in its own thread.

One turn of the thread (`SamplingLoop._turn`):

    receive   requests, cancellations and removed adapters, from the callers' threads (`inbox`)
    admit     waiting samples get slots, fairly between tenants (`waiting_queue`); for a tenant with nothing running,
              samples of others are preempted (`preemption`)
    prefill   a chunk of the admitted prompts; complete ones join the batch and get their first token
    decode    the newest token of every running sequence goes through the model, and each gets its next one
    stop      ended sequences leave the batch; a request is answered once all its samples have ended

KV cache is taken as sequences grow. When it runs out, samples are preempted: they wait again, before everything else of
their tenants, and are recomputed from their tokens when there is room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Self

import torch
from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SampleResponse
from twinkle.server.backends.hf.base_model import LoadedModel, copy_sharing_weights, load_base_model
from twinkle.server.backends.hf.device_memory import is_out_of_memory
from twinkle.server.backends.lora.experts import ExpertsWithLora
from twinkle.server.backends.lora.linear import wrap_modules
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.samplers.cache_usage import CacheUsage, RowCost
from twinkle.server.samplers.preemption import NEWCOMERS_SHARE, victim, victims_for_newcomer
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.stops import is_stopped, load_tokenizer
from twinkle.server.samplers.transformers.batches import (
    DECODING_PREFILL_TOKENS,
    Batch,
    SlotBatch,
    equal_length_batch,
)
from twinkle.server.samplers.transformers.inbox import AdapterRemoved, Cancel, Inbox, Message
from twinkle.server.samplers.transformers.layer_kinds import LayerKinds
from twinkle.server.samplers.transformers.limits import make_limits
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RoutedLinear
from twinkle.server.samplers.transformers.model_runner import ModelRunner, Prompt
from twinkle.server.samplers.transformers.next_tokens import NextTokens
from twinkle.server.samplers.transformers.prefill_delay import PrefillDelay
from twinkle.server.samplers.transformers.probe import first_working
from twinkle.server.samplers.transformers.running import Drawable, RunningSamples
from twinkle.server.samplers.transformers.sequences import (
    Item,
    Sequence,
    Task,
    make_task,
    prompt_of,
    task_of,
    waiting,
)
from twinkle.server.samplers.waiting_queue import Waiting, WaitingQueue

log = logging.getLogger("twinkle.sampler")


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
            loaded: its weights are shared, not copied; its module tree is left unchanged.
            max_rows: most sequences in the batch; default: by the device.
            max_cached_tokens: most tokens of running sequences in the KV cache, and of any single one; default: by
                device, context and free memory.
        """
        model = copy_sharing_weights(loaded.model)
        route = Route()
        wrap_modules(model, loaded.linears, lambda base, name: RoutedLinear(base, name, route))
        wrap_modules(model, loaded.experts, lambda base, name: ExpertsWithLora(base, name, route))
        self._loaded = loaded
        context = loaded.info.max_context_length
        self._runner = ModelRunner(model, route, LayerKinds.of(model.config, context))
        self._tokenizer = load_tokenizer(config.path)
        self._inbox = Inbox()
        self._adapters: dict[str, ResidentAdapter] = {}  # changed with the inbox's lock held
        self._accepted = 0
        makers = (self._slot_batch, self._equal_length_batch)
        self._limits = make_limits(loaded, max_rows, max_cached_tokens, RowCost())
        found = first_working(loaded.model, makers)
        self._limits = make_limits(
            loaded, max_rows, max_cached_tokens, found.cost, config.max_sampler_adapters
        )
        if found.index:
            log.warning(
                "%s can't be run with rows of different lengths (%s): only sequences of equal length are sampled "
                "together, which is slower",
                type(model).__name__,
                found.problem,
            )
        self._loop = SamplingLoop(self._inbox, makers[found.index], self._tokenizer)
        self._thread = threading.Thread(target=self._loop.run, name="sampling", daemon=True)
        self._thread.start()

    def _slot_batch(self) -> Batch:
        return SlotBatch(self._runner, self._limits)

    def _equal_length_batch(self) -> Batch:
        return equal_length_batch(self._runner, self._limits)

    @classmethod
    def create(cls, config: ModelConfig, backend: TrainingBackend | None) -> Self:
        if isinstance(backend, TransformersBackend):
            return cls(backend.loaded, config)
        # However many ranks train it, the sampling model is whole, on this rank's device.
        return cls(
            load_base_model(
                replace(ModelConfig(config.path, config.torch_dtype, config.device), trains=False)
            ),
            config,
        )

    def resident_adapters(self) -> list[str]:
        """Ids of the adapters that can be sampled from."""
        with self._inbox.lock:
            return list(self._adapters)

    def add_adapter(self, adapter_id: str, state: AdapterState) -> None:
        with self._inbox.lock:
            if adapter_id in self._adapters:
                return
        adapter = ResidentAdapter.of(state, self._loaded.dtype, self._loaded.device)
        with self._inbox.lock:
            self._adapters.setdefault(adapter_id, adapter)

    def remove_adapter(self, adapter_id: str) -> None:
        with self._inbox.lock:
            adapter = self._adapters.pop(adapter_id, None)  # tasks that use it hold it until they are done
            if adapter is not None:
                self._inbox.put(AdapterRemoved(adapter))

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        future: Future[SampleResponse] = Future()
        future.set_running_or_notify_cancel()  # from here on only the engine ends it
        try:
            with self._inbox.lock:
                if self._inbox.is_closed:
                    raise ServerFault("the sampling engine has been closed")
                self._inbox.put(self._accept(request, future))
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
            request, future, adapter, self._accepted, self._loaded.info, self._limits.longest, has_tokenizer
        )

    def cancel(self, request_id: str) -> None:
        """The request ends with `CancelledError` before the next step."""
        self._inbox.put(Cancel(request_id))

    def close(self) -> None:
        self._inbox.close()
        self._thread.join()
        self._adapters.clear()


class SamplingLoop:
    """The engine's thread: what waits and what runs. Only `inbox` is shared with other threads."""

    def __init__(self, inbox: Inbox, make_batch: Callable[[], Batch], tokenizer: Tokenizer | None) -> None:
        self._inbox = inbox
        self._make_batch = make_batch
        self._tokenizer = tokenizer
        self.running = RunningSamples(make_batch())
        self.waiting: WaitingQueue[Item] = WaitingQueue()
        self.cancellable: dict[str, set[Task]] = {}  # unfinished tasks, by request id
        self._is_full = False  # memory has run out, and nothing has ended since
        self._delay = PrefillDelay(DECODING_PREFILL_TOKENS)
        self._next_tokens = NextTokens()

    @torch.inference_mode()
    def run(self) -> None:
        while (messages := self._inbox.receive(wait=not (self.waiting or self.running))) is not None:
            try:
                self._turn(messages)
            except Exception as error:  # not one sample's fault: without this thread all would wait forever
                log.exception("the sampling engine starts over: %s", error)
                self._start_over(error)
        self._abandon()

    def _turn(self, messages: Iterable[Message]) -> None:
        self._receive(messages)
        if self.running.sequences:
            self._delay.stepped()  # only now: the step during which a prompt arrived counts for it
        self._admit()
        for work in (self._prefill, self._decode):
            drawable = work()
            if drawable is None:
                continue
            try:
                self._draw(*drawable)
            except Exception as error:
                for task in {sequence.task for sequence in drawable[0]}:
                    self._fail(task, error)

    def _start_over(self, error: Exception) -> None:
        """The batch's state is unknown: fail what is in it, and begin a new one. What waits may go on."""
        tasks = self.running.tasks
        try:
            self.running.start_over(self._make_batch)
            self._free_memory()
        except Exception:  # a failed device fails here too; the next request gets the error
            log.exception("the sampling engine could not start over")
        finally:
            self._end({task: error.with_traceback(None) for task in tasks})

    def _receive(self, messages: Iterable[Message]) -> None:
        cancelled: dict[Task, BaseException] = {}
        removed: list[ResidentAdapter] = []
        for message in messages:
            match message:
                case Task():
                    self._enqueue(message)
                case Cancel(request_id):
                    cancelled |= {task: CancelledError() for task in self.cancellable.get(request_id, ())}
                case AdapterRemoved(adapter):
                    removed.append(adapter)
        # Last, since it may fail: no message is lost with it.
        if cancelled:
            self._end(cancelled)
        for adapter in removed:
            self.running.batch.forget_adapter(adapter)

    def _enqueue(self, task: Task) -> None:
        request = task.request
        self.waiting.add(waiting(task, request.num_samples))
        self._delay.added(len(request.prompt), task.max_tokens)
        if request.request_id:
            self.cancellable.setdefault(request.request_id, set()).add(task)

    def _admit(self) -> None:
        """Give slots to waiting samples: at once if nothing is decoding, otherwise after the prefill delay."""
        running = self.running
        self._is_full &= bool(running)
        must_wait = running.sequences and not running.prefilling and not self._delay.has_expired
        if not self.waiting or must_wait or self._is_full:
            return
        if running:
            active = {task.request.tenant for task in running.tasks}
            for tenant in [tenant for tenant in self.waiting.tenants() if tenant not in active]:
                self._make_room_for(tenant)
        self._admit_from(self.waiting.take)
        self._delay.admitted(all_of_them=not self.waiting)

    def _make_room_for(self, tenant: str) -> None:
        """Preempt others' samples for this tenant, which has nothing running and takes their slots."""
        limits = self.running.batch.limits
        length, samples = self.waiting.wants(tenant)
        rows = victims_for_newcomer(self.running.slots, limits, length, samples)
        self._preempt({self.running.sequences[row] for row in rows}, cacheable=True)
        most = max(1, limits.rows // NEWCOMERS_SHARE)
        self._admit_from(lambda usage: self.waiting.take_from(tenant, most, usage))

    def _admit_from(self, take: Callable[[CacheUsage], list[tuple[Waiting[Item], int]]]) -> None:
        usage = self.running.usage
        if usage.rows < usage.limits.rows:
            taken = take(usage)
            self.running.admit({prompt_of(one.item, samples): one.item for one, samples in taken})

    def _preempt(self, sequences: AbstractSet[Sequence], cacheable: bool) -> None:
        """Take sequences out of the batch; they wait before everything else of their tenants.

        Args:
            cacheable: whether their keys and values may be kept until then, if the prefix cache has room.
        """
        self.running.drop(sequences, cacheable)
        for sequence in sorted(sequences, key=lambda one: one.order, reverse=True):
            self.waiting.put_back(waiting(sequence, 1))

    def _prefill(self) -> Drawable | None:
        """Prefill a chunk of the admitted prompts; returns the sequences that begin, with their logits."""
        if not self.running.prefilling:
            return None
        try:
            return self.running.prefill()
        except Exception as error:
            return self._prefill_singly(error)

    def _prefill_singly(self, error: Exception) -> Drawable | None:
        """Prefill one by one the prompts that can't be prefilled together; one that fails alone too gets the error, or
        waits for others to end if it lacks memory.
        """
        self._free_memory()
        prompts = dict(self.running.prefilling)
        self.running.cancel_prefill(lambda _: True)
        if len(prompts) == 1:
            [(prompt, item)] = prompts.items()
            if not is_out_of_memory(error) or self.running.sequences or prompt.rows == 1:
                self._not_prefilled(prompt, item, error)
                return None
        begun: list[Sequence] = []
        logits: list[torch.Tensor] = []
        for prompt, item in prompts.items():
            if not task_of(item).future.done() and (drawable := self._prefill_alone(prompt, item)):
                begun += drawable[0]
                logits.append(drawable[1])
        # A later one that failed has removed its request's samples.
        left = set(self.running.sequences)
        kept = [row for row, sequence in enumerate(begun) if sequence in left]
        return (tuple(begun[row] for row in kept), torch.cat(logits)[kept]) if kept else None

    def _prefill_alone(self, prompt: Prompt, item: Item) -> Drawable | None:
        """Prefill a prompt for as many of its samples as there is memory for, if nothing else runs; others wait."""
        samples = prompt.rows
        while True:
            again = replace(task_of(item).retry_prompt(prompt), rows=samples)
            try:
                drawable = self.running.prefill_whole(again, item)
                break
            except Exception as error:
                self._free_memory()
                self.running.cancel_prefill(lambda other: other is item)
                if samples == 1 or self.running.sequences or not is_out_of_memory(error):
                    self._not_prefilled(prompt, item, error)
                    return None
            samples //= 2
        if samples < prompt.rows:
            self._is_full = True
            self.waiting.put_back(replace(waiting(item, prompt.rows - samples), tokens=0))
        return drawable

    def _not_prefilled(self, prompt: Prompt, item: Item, error: Exception) -> None:
        """A prompt could not be prefilled alone."""
        self.running.cancel_prefill(lambda other: other is item)
        if self.running.sequences and is_out_of_memory(error):
            self._put_back({prompt: item})
        else:
            self._fail(task_of(item), error)

    def _put_back(self, prompts: dict[Prompt, Item]) -> None:
        """Memory has run out: prompts wait until a sample has ended."""
        self._is_full = True
        for prompt, item in reversed(prompts.items()):
            if isinstance(item, Task):
                item.take_back(prompt)
            self.waiting.put_back(replace(waiting(item, prompt.rows), tokens=0))

    def _decode(self) -> Drawable | None:
        """Run every sequence's newest token through the model; returns the logits of the next ones."""
        running = self.running
        running.recompute_stale()
        while running.outgrows_memory and (row := victim(running.slots)) is not None:
            self._preempt({running.sequences[row]}, cacheable=True)
        if not running.sequences:
            return None
        try:
            logits = running.batch.step([sequence.tokens[-1] for sequence in running.sequences])
        except Exception as error:
            self._not_decoded(error)
            return None
        return running.sequences, logits

    def _not_decoded(self, error: Exception) -> None:
        """If memory has run out, prompts on their way wait until a sample has ended; if there are none, a sample is
        preempted until then. Otherwise the newest request fails.
        """
        self._free_memory()
        running = self.running
        if is_out_of_memory(error) and running.prefilling:
            prompts = dict(running.prefilling)
            running.cancel_prefill(lambda _: True)
            self._put_back(prompts)
            return
        row = victim(running.slots) if is_out_of_memory(error) else None
        if row is None:
            self._fail(max(running.sequences, key=lambda sequence: sequence.order).task, error)
            return
        log.info("memory ran out: a sample is preempted (%s)", error)
        self._is_full = True
        self._preempt({running.sequences[row]}, cacheable=False)

    def _draw(self, sequences: tuple[Sequence, ...], logits: torch.Tensor) -> None:
        """Draw the next token of each sequence, and stop those that have ended."""
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
        self.running.drop(ended, cacheable=True)

    def _fail(self, task: Task, error: Exception) -> None:
        log.warning("a sample failed: %s", error)
        self._end({task: error.with_traceback(None)})  # without the frames that hold its tensors

    def _end(self, errors: Mapping[Task, BaseException]) -> None:
        """End each task with its error, wherever it is; the others go on."""
        for task, error in errors.items():
            self._forget(task)
            task.fail(error)
        self._is_full = False  # those that wait may find room now
        self.waiting.remove(lambda item: task_of(item) in errors)
        self.running.cancel_prefill(lambda item: task_of(item) in errors)
        self.running.drop(
            {sequence for sequence in self.running.sequences if sequence.task in errors}, cacheable=False
        )

    def _forget(self, task: Task) -> None:
        """It can't be cancelled any more."""
        request_id = task.request.request_id
        tasks = self.cancellable.get(request_id, set())
        tasks.discard(task)
        if not tasks:
            self.cancellable.pop(request_id, None)

    def _free_memory(self) -> None:
        self.running.batch.free_memory()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _abandon(self) -> None:
        """The engine was closed: cancel whatever is unfinished."""
        tasks = {message for message in self._inbox.take() if isinstance(message, Task)}
        tasks |= self.running.tasks.union(map(task_of, self.waiting.items()))
        self._end({task: CancelledError() for task in tasks})
