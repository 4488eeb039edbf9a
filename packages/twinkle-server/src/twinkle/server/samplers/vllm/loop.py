"""What waits and what runs. Single-threaded: everything here runs on the engine's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import aclosing

from tokenizers import Tokenizer

from twinkle.protocol.errors import InvalidRequest, ServerFault, words_of
from twinkle.protocol.types import SampledSequence
from twinkle.server.samplers.prompt_answers import asks_about_prompt
from twinkle.server.samplers.protocol import EngineDied
from twinkle.server.samplers.vllm import prompts
from twinkle.server.samplers.vllm.admission import Admission
from twinkle.server.samplers.vllm.api import VllmApi
from twinkle.server.samplers.vllm.launch import RunningVllm
from twinkle.server.samplers.vllm.requests import Collected, Task, sampling_params
from twinkle.server.samplers.vllm.served import ServedModel

log = logging.getLogger("twinkle.sampler")

DIED = "vLLM's process has ended, and its adapters with it; its own log says why. The sampler must be started again"


class SamplingLoop:
    """Gives vLLM samples in turn, and ends tasks."""

    def __init__(
        self,
        api: VllmApi,
        vllm: RunningVllm,
        model: ServedModel,
        tokenizer: Tokenizer | None,
        done: Callable[[Task], None],
    ) -> None:
        """
        Args:
            done: is called for each task that has ended.
        """
        self._api = api
        self._vllm = vllm
        self._model = model
        self._tokenizer = tokenizer
        self._done = done
        self._admission: Admission[Task] = Admission(vllm.sequences, vllm.adapters, vllm.cached_tokens)
        self._tasks: dict[Task, set[asyncio.Task[None]]] = {}  # unfinished ones, and their samples that run
        self._numbers = itertools.count()
        self._died: EngineDied | None = None

    def submit(self, task: Task) -> None:
        self._tasks[task] = set()
        if self._died is not None:
            self._end(task, self._died)
            return
        self._admission.add(task, task.request.num_samples)
        self._admit()

    def cancel(self, request_id: str) -> None:
        for task in [task for task in self._tasks if task.request.request_id == request_id]:
            self._end(task, CancelledError())
        self._admit()  # it may have been the next one, and held up the others

    async def close(self) -> None:
        """Cancel what is unfinished."""
        running = [sample for samples in self._tasks.values() for sample in samples]
        for task in list(self._tasks):
            self._end(task, CancelledError())
        await asyncio.gather(*running, return_exceptions=True)

    def _admit(self) -> None:
        while (task := self._admission.next()) is not None:
            sample = asyncio.create_task(self._run(task, task.begun))
            task.begun += 1
            self._tasks[task].add(sample)
            # Not at the end of `_run`: a task that is cancelled before its first step never enters it.
            sample.add_done_callback(lambda ended, task=task: self._sample_ended(task, ended))

    def _sample_ended(self, task: Task, sample: asyncio.Task[None]) -> None:
        self._tasks.get(task, set()).discard(sample)
        self._admission.ended(task)
        self._admit()

    async def _run(self, task: Task, index: int) -> None:
        """Draw a sample; its task ends with the last one, or with an error."""
        try:
            task.finished[index] = await self._draw(task, index)
        except self._api.EngineDeadError as error:
            self._die(error)
        except ValueError as error:  # what vLLM says of requests that it refuses
            self._end(task, InvalidRequest(f"the request was refused by vllm: {words_of(error)}"))
        except Exception as error:
            log.warning("a sample failed: %s", words_of(error.__cause__ or error))
            self._end(task, error)
        else:
            if task.is_complete:
                self._end(task, None)

    async def _draw(self, task: Task, index: int) -> SampledSequence:
        """
        Raises:
            Exception: what vLLM raised.
        """
        scores_tokens = self._vllm.scores_tokens
        params = sampling_params(self._api, task, index, scores_tokens, self._model.vocab_size)
        # Nobody learns by the time that it takes what others have sent.
        prompt = self._api.tokens_input(task.request.prompt.tolist(), cache_salt=task.tenant or None)
        adapter = None if task.adapter is None else task.adapter.request
        collected = Collected(task)
        asked = index == 0 and asks_about_prompt(task.request)
        outputs = self._vllm.llm.generate(prompt, params, str(next(self._numbers)), lora_request=adapter)
        async with aclosing(outputs):  # vLLM stops drawing when it is closed
            async for output in outputs:
                if asked:  # they come with the first token
                    task.answers = prompts.answers(task.request, output, task.seed, scores_tokens)
                    asked = False
                sequence = collected.add(output.outputs[0], self._tokenizer)
                if sequence is not None:
                    return sequence
        raise ServerFault("vllm ended a sample without a reason; send the request again")

    def _die(self, error: Exception) -> None:
        if self._died is None:
            log.error("%s", DIED)
            self._died = EngineDied(DIED)
            self._died.__cause__ = error
        for task in list(self._tasks):
            self._end(task, self._died)

    def _end(self, task: Task, error: BaseException | None) -> None:
        """A task ends, with its error if it has one; what still runs of it is cancelled."""
        samples = self._tasks.pop(task, None)
        if samples is None:
            return
        self._admission.forget(task)
        current = asyncio.current_task()
        for sample in samples:
            if sample is not current:
                sample.cancel()
        if error is None:
            task.succeed()
        else:
            task.fail(error)
        self._done(task)
