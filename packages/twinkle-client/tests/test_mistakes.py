"""What can't be sent is an error at once, and the calls after it work: no number of the run is lost."""

from __future__ import annotations

import itertools

import pytest

from twinkle.loss import simpo_loss
from twinkle.protocol.errors import InvalidRequest


class Sent(list):
    """A channel that keeps what it is given."""

    def submit(self, request):
        from concurrent.futures import Future

        self.append(request)
        return Future()


@pytest.fixture
def sent():
    return Sent()


@pytest.fixture
def client(sent):
    from twinkle.verbs.training import TrainingClient

    return TrainingClient(sent, "run", "session", itertools.count())


DATA = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DATA, simpo_loss()), "loss_fn: ClosedFormLoss is no name of a loss.* forward_backward_custom"),
        ((DATA, 3), "loss_fn: int is no name"),
        ((DATA, "ppo", "x"), "loss_fn_config: expected a mapping of names to numbers, got str"),
        ((DATA, "ppo", {"clip_low_threshold": [1]}), r"loss_fn_config.clip_low_threshold: \[1\] is neither"),
        (([3],), r"data\[0\]: int is neither a Datum nor a feature"),
    ],
)
def test_a_pass_that_can_not_be_sent_takes_no_number(client, sent, arguments, message: str):
    with pytest.raises(InvalidRequest, match=message):
        client.forward_backward(*arguments)
    client.forward_backward(DATA)
    client.optim_step()
    assert [request.seq_id for request in sent] == [1, 2]


def test_a_request_that_the_channel_refuses_takes_no_number(client, sent, monkeypatch: pytest.MonkeyPatch):
    def refuse(request):
        raise TypeError("can't be encoded")

    for call in (lambda: client.forward_backward(DATA), client.optim_step):
        with monkeypatch.context() as patched:
            patched.setattr(sent, "submit", refuse, raising=False)
            with pytest.raises(TypeError):
                call()
    client.forward_backward(DATA)
    assert [request.seq_id for request in sent] == [1]
