"""What is changed in vLLM's workers, on stand-ins for its parts: also for the runner that only GPUs have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinkle.server.samplers.vllm.worker import TwinkleWorker

SLOTS, RANK, IN, OUT = 3, 4, 6, 10


def matrices(seed: int, out: int = OUT) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(SLOTS, 1, RANK, IN, generator=draw)
    return a, torch.randn(SLOTS, 1, out, RANK, generator=draw)


def terms(x: Tensor, slots: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Row by row, by definition."""
    rows = [
        torch.zeros(b.shape[2]) if slot < 0 else b[slot, 0] @ (a[slot, 0] @ row)
        for row, slot in zip(x, slots.tolist(), strict=True)
    ]
    return torch.stack(rows)


class Punica:
    """vLLM's holder of the batch's slots: by token, and by row that is sampled from."""

    def __init__(self) -> None:
        self.token_lora_indices = torch.empty(0, dtype=torch.long)
        self.sampler_indices = torch.empty(0, dtype=torch.long)
        self.theirs = 0

    def update_metadata(self, tokens: list[int], sampled: list[int]) -> None:
        self.token_lora_indices, self.sampler_indices = torch.tensor(tokens), torch.tensor(sampled)

    def add_lora_logits(self, *_: Any, **__: Any) -> None:
        self.theirs += 1

    def add_lora_linear(self, *_: Any, **__: Any) -> None:
        raise AssertionError("replaced on a CPU")


class Runner:
    """Of the first kind; it scores the prompt in the batch's rows 1 to 4."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.punica = Punica()
        manager = SimpleNamespace(punica_wrapper_mapping={"": self.punica})
        self.lora_manager = SimpleNamespace(_adapter_manager=manager)
        self.head = matrices(1)
        self.sampler = SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=self.forward))

    def forward(self, logits: Tensor, generators: Any, k: Any, p: Any) -> tuple[Tensor, Tensor]:
        if k is not None:
            logits[:, 1:] = -torch.inf
        return logits.argmax(-1), logits.log_softmax(-1)

    def head_terms(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), OUT)
        self.punica.add_lora_logits(y, x, *self.head, 1.0)
        return y

    def _get_prompt_logprobs_dict(self, hidden: Tensor, scheduled: Any) -> Tensor:
        return self.head_terms(hidden[1:5])


def prepared(runner: Any) -> Any:
    worker = TwinkleWorker()
    worker.model_runner = runner
    worker.prepare_for_twinkle()
    return runner


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_prompts_rows_have_the_terms_of_their_own_adapters(device: str):
    runner = prepared(Runner(device))
    hidden = torch.randn(7, IN)
    runner.punica.update_metadata([0, 0, 2, -1, 1, 1, 1], [0, 1])
    found = runner._get_prompt_logprobs_dict(hidden, {})
    torch.testing.assert_close(found, terms(hidden[1:5], torch.tensor([0, 2, -1, 1]), *runner.head))
    with pytest.raises(RuntimeError, match="not the batch's"):
        runner._get_prompt_logprobs_dict(SimpleNamespaceTensor(hidden), {})
    # Rows that are sampled from: on a CPU by the slots of those, elsewhere as vLLM does it.
    y = runner.head_terms(hidden[:2])
    if device == "cpu":
        torch.testing.assert_close(y, terms(hidden[:2], torch.tensor([0, 1]), *runner.head))
    assert runner.punica.theirs == (device == "cuda")


def SimpleNamespaceTensor(hidden: Tensor) -> Any:
    """Hidden states whose slices lie elsewhere."""

    class Copies:
        def __getitem__(self, rows: slice) -> Tensor:
            return hidden[rows].clone()

        def __len__(self) -> int:
            return len(hidden)

        stride, element_size, data_ptr = hidden.stride, hidden.element_size, hidden.data_ptr

    return Copies()


def test_the_second_runners_prompts_too():
    class Scorer:
        def compute_prompt_logprobs(self, logits: Any, hidden: Tensor, batch: Any) -> Tensor:
            return logits(hidden[2:4])

        compute_prompt_token_id_logprobs = compute_prompt_logprobs

    runner: Any = Runner("cuda")
    del Runner._get_prompt_logprobs_dict
    try:
        runner.prompt_logprobs_worker = Scorer()
        runner.sampler = SimpleNamespace(
            _sample_random=lambda logits, *_: (logits.argmax(-1), logits.fill_(-1))
        )
        prepared(runner)
    finally:
        Runner._get_prompt_logprobs_dict = lambda self, hidden, scheduled: self.head_terms(hidden[1:5])
    hidden = torch.randn(5, IN)
    runner.punica.update_metadata([0, 1, 2, -1, 1], [2])
    scorer = runner.prompt_logprobs_worker
    for score in (scorer.compute_prompt_logprobs, scorer.compute_prompt_token_id_logprobs):
        found = score(runner.head_terms, hidden, None)
        torch.testing.assert_close(found, terms(hidden[2:4], torch.tensor([2, -1]), *runner.head))
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, before = runner.sampler._sample_random(
        logits.clone(), None, None, None, torch.tensor([2]), None, False
    )
    assert tokens.tolist() == [1]
    torch.testing.assert_close(before, logits)


def test_logprobs_are_those_before_the_filters():
    runner = prepared(Runner("cpu"))
    logits = torch.tensor([[0.5, 3.0, 2.0], [1.0, 0.0, 0.0]])
    draw = runner.sampler.topk_topp_sampler.forward
    tokens, logprobs = draw(logits.clone(), {}, torch.tensor([1, 1]), None)
    assert tokens.tolist() == [0, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1))
    torch.testing.assert_close(draw(logits.clone(), {}, None, None)[1], logits.log_softmax(-1))


@pytest.mark.parametrize("tokens", [[0, 2, -1, 1, 0], [-1] * 5, [2] * 5])
def test_linear_layers_have_each_rows_own_terms_in_each_of_their_parts(tokens: list[int]):
    """Rows of the base model, -1, get none: not those of the last slot."""
    runner = prepared(Runner("cpu"))
    runner.punica.update_metadata(tokens, [])
    x, y = torch.randn(5, IN), torch.randn(5, OUT + 4)
    (a, b), (a2, b2) = matrices(2), matrices(3, 4)
    expected = y + torch.cat([terms(x, torch.tensor(tokens), *pair) for pair in ((a, b), (a2, b2))], 1) * 2
    runner.punica.add_lora_linear(y, x, (a, a2), (b, b2), 2.0, (OUT, 4))
    torch.testing.assert_close(y, expected)


def test_a_vllm_without_what_is_changed_is_refused():
    runner: Any = Runner("cpu")
    runner.sampler = SimpleNamespace()
    with pytest.raises(RuntimeError, match="install another version"):
        prepared(runner)
