import itertools
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twinkle.protocol import messages as m
from twinkle.protocol.types import Datum, ForwardBackwardOutput, ModelInput, TensorData
from twinkle.verbs import training
from twinkle.verbs.training import TrainingClient


@given(st.lists(st.integers(1, 60_000), max_size=12))
def test_chunks_hold_every_datum_once_in_order_and_within_the_limits(lengths: list[int]):
    data = [Datum(ModelInput.from_ints(np.zeros(n, np.int32))) for n in lengths]
    cut = training.split_batch(data)
    assert [id(d) for chunk in cut for d in chunk] == [id(d) for d in data]
    for chunk in cut:
        assert len(chunk) <= 1 or sum(d.model_input.length for d in chunk) <= training.MAX_REQUEST_TOKENS
    assert len(cut) == 1 or all(cut)


def output(metrics: dict[str, float], datums: int) -> ForwardBackwardOutput:
    return ForwardBackwardOutput([{"logprobs": TensorData(np.zeros(1, np.float32))}] * datums, metrics)


def test_joined_metrics_are_reduced_by_their_suffix_and_means_weighted_by_datums():
    joined = training.join_outputs(
        [
            output({"loss:sum": 1.0, "kl:mean": 1.0, "x:max": 3.0, "y:min": 3.0, "only-here:sum": 1.0}, 3),
            output({"loss:sum": 2.5, "kl:mean": 5.0, "x:max": 2.0, "y:min": 2.0}, 1),
        ]
    )
    assert joined.metrics == {"loss:sum": 3.5, "kl:mean": 2.0, "x:max": 3.0, "y:min": 2.0}
    assert len(joined.loss_fn_outputs) == 4


class _Channel:
    """Takes requests and answers none."""

    def __init__(self) -> None:
        self.sent: list[tuple[m.Operation, Future[m.Result]]] = []

    def submit(self, request: m.Operation) -> Future[m.Result]:
        self.sent.append((request, Future()))
        return self.sent[-1][1]


def test_what_a_run_was_asked_for_is_sent_though_its_result_is_cancelled():
    """Each has a number, and what comes after it waits for a number that is missing."""
    channel = _Channel()
    client = TrainingClient(cast(Any, channel), "run", "session", itertools.count())
    batch = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    pendings = [client.forward_backward(batch), client.optim_step(), client.save_state("name")]
    assert [pending.cancel() for pending in pendings] == [True] * 3
    assert [cast(Any, request).seq_id for request, _ in channel.sent] == [1, 2, 3]
    assert not any(future.cancelled() for _, future in channel.sent)
    for _, future in channel.sent:
        future.set_result(m.OptimStepResponse())
