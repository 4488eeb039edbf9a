"""The engine's thread: admit who waits, draw a token for every row, take out who has ended; sleep when all have.

Models whose layers are all full attention run many requests in one batch. Others (sliding windows, the linear attention
of Qwen3.5) run one request at a time, its samples together: see `batches`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from typing import Self, TypeAlias

import torch
from torch import Tensor

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.protocol.types import SampleResponse, TopkRow
from twinkle.server.backends.protocol import AdapterState, ModelConfig, TrainingBackend
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.base_model import LoadedModel, copy_sharing_weights, load_base_model
from twinkle.server.backends.transformers.expert_lora import wrap_experts
from twinkle.server.backends.transformers.wrapped_linear import wrap_linears
from twinkle.server.samplers.protocol import GenerateRequest
from twinkle.server.samplers.transformers.batches import Network, Prompt, SingleBatch, make_batch
from twinkle.server.samplers.transformers.draw import (
    DrawSettings,
    Uniforms,
    draw,
    tempered_logprobs,
    topk_rows,
)
from twinkle.server.samplers.transformers.lora import ResidentAdapter, Route, RoutedLinear
from twinkle.server.samplers.transformers.sequences import Sequence, Task
from twinkle.server.samplers.transformers.stops import is_stopped, load_tokenizer, stop_rule
from twinkle.server.samplers.waiting import Waiting, WaitingLine

log = logging.getLogger("twinkle.sampler")

# Sequences, and the logits [sequences, vocabulary] of the next token of each.
Drawable: TypeAlias = tuple[list[Sequence], Tensor]

MAX_ROWS_CPU = 64
MAX_ROWS_GPU = 256
# Rows times their longest length, at most: what the cache may come to.
MAX_CACHED_TOKENS_CPU = 2**17
MAX_CACHED_TOKENS_GPU = 2**20


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
        self._batch = make_batch(self._network, self._max_rows)
        self._max_tokens = MAX_CACHED_TOKENS_GPU if on_gpu else MAX_CACHED_TOKENS_CPU
        self._tokenizer = load_tokenizer(config.path)
        self._adapters: dict[str, ResidentAdapter] = {}
        self._sequences: list[Sequence] = []  # row i of the batch is the i-th
        self._line: WaitingLine[Task] = WaitingLine()
        self._wake = threading.Condition()  # held wherever the line or one of the two below is touched
        self._under_way: dict[str, set[Task]] = {}  # by request id, those that can be cancelled
        self._unwanted: set[Task] = set()  # cancelled, not taken out yet
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
            self._adapters.pop(adapter_id, None)  # tasks that use it hold it until they are done

    def generate(self, request: GenerateRequest) -> Future[SampleResponse]:
        future: Future[SampleResponse] = Future()
        future.set_running_or_notify_cancel()  # only the engine ends it from here on
        try:
            with self._wake:
                if self._closed:
                    raise ServerFault("the sampling engine has been closed")
                task = self._accept(request, future)
                self._line.add(Waiting(request.tenant, task, task.longest, request.num_samples))
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
        length, limit = len(request.prompt), info.max_context_length
        if not 1 <= length <= limit:
            raise InvalidRequest(f"prompt: {length} tokens; this model takes 1 to {limit}")
        _check_targets(request, info.vocab_size)
        # One token can be drawn after a prompt that fills the context: it is never read.
        room = max(1, limit - length)
        task = Task(
            request=request,
            future=future,
            adapter=self._adapters[request.adapter_id] if request.adapter_id is not None else None,
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
        """Admit who waits, or a step for everybody; then draw the next token of those concerned."""
        self._drop_unwanted()
        drawable = self._admit() or self._step()
        if drawable is None:
            return
        try:
            self._advance(*drawable)
        except Exception as error:
            for task in {sequence.task for sequence in drawable[0]}:
                self._fail(task, error)

    def _start_over(self, error: Exception) -> None:
        """Nobody knows what state the batch is in: who is in it fails, and a new one is begun. Who waits may come."""
        tasks = {sequence.task for sequence in self._sequences}
        self._sequences = []
        self._batch = make_batch(self._network, self._max_rows)
        self._free_memory()
        self._end({task: error.with_traceback(None) for task in tasks})

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._line or self._sequences or self._unwanted)
            return not self._closed

    def _drop_unwanted(self) -> None:
        with self._wake:
            tasks, self._unwanted = self._unwanted, set()
        if tasks:
            self._end({task: CancelledError() for task in tasks})

    def _admit(self) -> Drawable | None:
        """Read the prompts of who waits and may come in; returns the sequences that begin, with their logits."""
        one_at_a_time = isinstance(self._batch, SingleBatch)
        if one_at_a_time and self._sequences:
            return None
        longest = max((sequence.task.longest for sequence in self._sequences), default=0)
        with self._wake:
            places = self._batch.max_rows - self._batch.rows
            taken = self._line.take(
                places, longest, self._batch.rows, self._max_tokens, at_most=1 if one_at_a_time else None
            )
        if not taken:
            return None
        prompts = [waiting.item.prompt(samples) for waiting, samples in taken]
        tasks = [waiting.item for waiting, _ in taken]
        try:
            logits = self._batch.admit(prompts)
        except Exception as error:
            return self._admit_singly(taken, error)
        return self._begin(tasks, prompts), logits

    def _admit_singly(self, taken: list[tuple[Waiting[Task], int]], error: Exception) -> Drawable | None:
        """Prompts that can't be read together are read one by one; one that can't be read alone fails."""
        self._free_memory()
        if len(taken) == 1:
            self._fail(taken[0][0].item, error)
            return None
        begun: list[Sequence] = []
        all_logits: list[Tensor] = []
        for waiting, samples in taken:
            prompt = waiting.item.prompt(samples)
            try:
                all_logits.append(self._batch.admit([prompt]))
            except Exception as own_error:
                self._free_memory()
                self._fail(waiting.item, own_error)
            else:
                begun += self._begin([waiting.item], [prompt])
        return (begun, torch.cat(all_logits)) if begun else None

    def _begin(self, tasks: list[Task], prompts: list[Prompt]) -> list[Sequence]:
        """Sequences for the rows that were just made: each prompt's first sample, then the others, prompt by prompt."""
        order = [*range(len(tasks)), *(i for i, prompt in enumerate(prompts) for _ in range(prompt.rows - 1))]
        for task, prompt in zip(tasks, prompts, strict=True):
            task.note_prompt(prompt)
        begun: list[Sequence] = []
        for i in order:
            task = tasks[i]
            begun.append(Sequence(task, task.admitted, Uniforms(task.seed, task.admitted)))
            task.admitted += 1
        self._sequences += begun
        return begun

    def _step(self) -> Drawable | None:
        """One more token for everybody."""
        if not self._sequences:
            return None
        newest = torch.tensor(
            [sequence.tokens[-1] for sequence in self._sequences], device=self._loaded.device
        )
        try:
            return list(self._sequences), self._batch.step(newest)
        except Exception as error:  # most likely memory: the newest request makes room for the others
            self._free_memory()
            self._fail(self._sequences[-1].task, error)
            return None

    def _advance(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Draw the next token of each sequence, and take out those that have ended."""
        self._draw(sequences, logits)
        ended: set[Sequence] = set()
        for sequence in sequences:
            stopped = is_stopped(sequence.task.stop, sequence.tokens, self._tokenizer)
            if stopped or len(sequence.tokens) >= sequence.task.max_tokens:
                sequence.task.finished[sequence.index] = sequence.result(stopped)
                ended.add(sequence)
                if sequence.task.is_complete:
                    self._forget(sequence.task)
                    sequence.task.succeed()
        self._drop([row for row, sequence in enumerate(self._sequences) if sequence in ended])

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> None:
        settings = _draw_settings(sequences, logits)
        uniforms = torch.tensor(
            [s.uniforms.next() for s in sequences], dtype=torch.float64, device=logits.device
        )
        logprobs = tempered_logprobs(logits, settings.temperature)
        tokens = draw(logprobs, settings, uniforms)
        chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
        k = max(sequence.task.request.topk_sample_logprobs for sequence in sequences)
        best: list[TopkRow] = []
        if k:
            best = topk_rows(*logprobs.topk(k, dim=-1))
        for i, (sequence, token, logprob) in enumerate(zip(sequences, tokens.tolist(), chosen, strict=True)):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            own_k = sequence.task.request.topk_sample_logprobs
            if own_k:
                sequence.topk.append((best[i] or [])[:own_k])

    def _drop(self, rows: list[int]) -> None:
        if rows:
            self._sequences = [self._sequences[old] for old in self._batch.drop(rows)]

    def _fail(self, task: Task, error: Exception) -> None:
        log.warning("a sample failed: %s", error)
        self._end({task: error.with_traceback(None)})  # without the frames that hold its tensors

    def _end(self, errors: Mapping[Task, BaseException]) -> None:
        """Tasks leave batch and line with an error each; the others go on."""
        for task, error in errors.items():
            self._forget(task)
            task.fail(error)
        self._drop([row for row, sequence in enumerate(self._sequences) if sequence.task in errors])
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
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _abandon(self) -> None:
        """The engine was closed: whatever is not done is cancelled."""
        with self._wake:
            tasks = {waiting.item for waiting in self._line.remove_all()}
        tasks |= {sequence.task for sequence in self._sequences}
        self._end({task: CancelledError() for task in tasks})
        self._adapters.clear()


def _check_targets(request: GenerateRequest, vocab_size: int) -> None:
    """
    Raises:
        InvalidRequest: if the targets don't fit prompt and vocabulary: on a GPU that would end the process.
    """
    targets = request.target_tokens
    if targets is None:
        return
    rows = len(request.prompt) - 1
    if targets.ndim != 2 or len(targets) != rows:
        raise InvalidRequest(
            f"target_prompt_logprobs: shape {list(targets.shape)}; it must be [{rows}, K], a row for each prompt token "
            "after the first"
        )
    if targets.size and not -1 <= targets.min() <= targets.max() < vocab_size:
        raise InvalidRequest(
            f"target_prompt_logprobs: must be token ids from 0 to {vocab_size - 1}, or -1 where nothing is asked for"
        )


def _draw_settings(sequences: list[Sequence], logits: Tensor) -> DrawSettings:
    params = [sequence.task.request.params for sequence in sequences]
    vocab_size = logits.shape[-1]
    device = logits.device
    return DrawSettings(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([p.top_k if p.top_k > 0 else vocab_size for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        filtered=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params),
    )
