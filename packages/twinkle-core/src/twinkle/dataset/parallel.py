"""Encoding in several processes, with the same results and errors as in one."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

from twinkle.dataset.encoding import Encoder, EncodingTask, Outcome, run_tasks
from twinkle.protocol.errors import InvalidRequest

logger = logging.getLogger(__name__)

# Large enough to amortise the transfer, small enough to move the progress bar and to keep all processes busy to the
# end.
_CHUNK_ROWS = 128

# In a worker process: set by `_start`.
_encoder: Encoder | None = None


def encode_jobs(
    encoder: Encoder, tasks: Sequence[EncodingTask], num_proc: int | None, done: Callable[[int], object]
) -> list[Outcome]:
    """Encode conversations in `num_proc` processes (default: one per core), or in this one if that is 1.

    Args:
        done: called with the number of tasks finished since the last call.

    Raises:
        InvalidRequest: naming the place of the first task that fails, in whichever process; or if a process died.
    """
    if num_proc is not None and num_proc < 1:
        raise InvalidRequest(
            f"num_proc: {num_proc}; allowed are whole numbers from 1, and None for one process a core"
        )
    processes = _cores() if num_proc is None else num_proc
    chunks = [tasks[begin : begin + _CHUNK_ROWS] for begin in range(0, len(tasks), _CHUNK_ROWS)]
    processes = min(processes, len(chunks))
    if processes <= 1:
        return run_tasks(encoder, tasks, done)
    return _encode_chunks(encoder, chunks, processes, done)


def _encode_chunks(
    encoder: Encoder, chunks: Sequence[Sequence[EncodingTask]], processes: int, done: Callable[[int], object]
) -> list[Outcome]:
    # Imported here since it is slow. Unlike multiprocessing's, its processes don't run the script again, so scripts
    # need no `if __name__ == "__main__"`.
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    # The template is sent once to each process, not with each chunk: a tokenizer may be 10 MB.
    executor = cast(Any, ProcessPoolExecutor)(max_workers=processes, initializer=_start, initargs=(encoder,))
    outcomes: list[Outcome] = []
    finished = False
    try:
        futures = [executor.submit(_work, chunk) for chunk in chunks]
        for future in futures:
            chunk_outcomes = cast(list[Outcome], future.result())
            outcomes += chunk_outcomes
            done(len(chunk_outcomes))
        finished = True
    except cast(Any, BrokenProcessPool) as error:
        raise InvalidRequest(
            f"num_proc: one of {processes} processes died, most often for lack of memory; set fewer"
        ) from error
    finally:
        # After an error, the remaining work is useless.
        executor.shutdown(wait=True, kill_workers=not finished)
    return outcomes


def _cores() -> int:
    from loky import cpu_count

    return cast(int, cast(Any, cpu_count)())


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core


def _work(tasks: Sequence[EncodingTask]) -> list[Outcome]:
    assert _encoder is not None, "_start runs first"
    return run_tasks(_encoder, tasks, lambda _: None)
