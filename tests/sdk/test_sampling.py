"""What a sampling client does."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import TensorData, types
from tinker_sdk import MODEL, now

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture
def sampler(service):
    return now(service.create_sampling_client(base_model=MODEL))


def prompt(tokens: list[int] = PROMPT) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens)


def params(**settings: Any) -> types.SamplingParams:
    values: dict[str, Any] = {"max_tokens": 4, "stop": [], **settings}
    return types.SamplingParams(**values)


def test_greedy_samples_are_the_models_argmax(sampler, base_logprobs):
    [sequence] = sampler.sample(prompt(), 1, params(temperature=0.0)).result().sequences
    tokens = list(PROMPT)
    for token, logprob in zip(sequence.tokens, sequence.logprobs, strict=True):
        row = base_logprobs(tokens)[-1]
        assert token == int(row.argmax())
        assert logprob == pytest.approx(float(row.max()), abs=1e-4)
        tokens.append(token)
    assert str(sequence.stop_reason) == "length"


def test_logprobs_are_tempered_for_samples_and_plain_for_prompts(sampler, base_logprobs):
    result = sampler.sample(
        prompt(), 3, params(temperature=0.5, seed=3), include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()
    for sequence in result.sequences:
        tokens = list(PROMPT)
        for token, logprob in zip(sequence.tokens, sequence.logprobs, strict=True):
            assert logprob == pytest.approx(float(base_logprobs(tokens, 0.5)[-1][token]), abs=1e-3)
            tokens.append(token)
    plain = base_logprobs(PROMPT)
    assert result.prompt_logprobs[0] is None
    expected = [float(plain[i][PROMPT[i + 1]]) for i in range(len(PROMPT) - 1)]
    assert result.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert sampler.compute_logprobs(prompt()).result()[1:] == pytest.approx(expected, abs=1e-4)
    assert result.topk_prompt_logprobs[0] is None
    for i, row in enumerate(result.topk_prompt_logprobs[1:]):
        best = np.argsort(-plain[i])[:2]
        assert [token for token, _ in row] == best.tolist()
        assert [logprob for _, logprob in row] == pytest.approx(plain[i][best].tolist(), abs=1e-4)


def test_seeds_reproduce_in_any_company(sampler):
    alone = sampler.sample(prompt(), 2, params(seed=7, max_tokens=8)).result().sequences
    crowd = [sampler.sample(prompt(), 2, params(seed=seed, max_tokens=8)) for seed in range(5, 10)]
    together = crowd[2].result().sequences
    assert [s.tokens for s in alone] == [s.tokens for s in together]
    assert alone[0].tokens != alone[1].tokens
    assert crowd[0].result().sequences[0].tokens != alone[0].tokens


def test_stops(sampler, base_logprobs):
    [free] = sampler.sample(prompt(), 1, params(temperature=0.0, max_tokens=8)).result().sequences
    stop = free.tokens[2]
    end = free.tokens.index(stop) + 1
    [cut] = sampler.sample(prompt(), 1, params(temperature=0.0, max_tokens=8, stop=[stop])).result().sequences
    assert cut.tokens == free.tokens[:end]
    assert str(cut.stop_reason) == "stop"
    with pytest.raises(tinker.BadRequestError, match="can't end a text"):
        sampler.sample(prompt(), 1, params(stop=[""])).result()


def test_without_max_tokens_the_context_is_the_end(sampler):
    [sequence] = sampler.sample(prompt([1] * 250), 1, types.SamplingParams(stop=[])).result().sequences
    assert len(sequence.tokens) == 6


@pytest.mark.since(0, 29)
def test_likeliest_tokens_and_chosen_ones_at_each_position(sampler, base_logprobs):
    ids = np.full((4, 2), -1)
    ids[1, 0], ids[3] = 7, [8, 9]
    result = sampler.sample(
        prompt(),
        1,
        params(temperature=1.0, seed=1),
        topk_sample_logprobs=3,
        target_prompt_logprobs=TensorData.from_numpy(ids),
    ).result()
    [sequence] = result.sequences
    tokens = list(PROMPT)
    for row, token in zip(sequence.topk_logprobs, sequence.tokens, strict=True):
        expected = base_logprobs(tokens)[-1]
        assert [t for t, _ in row] == np.argsort(-expected)[:3].tolist()
        tokens.append(token)
    plain = base_logprobs(PROMPT)
    found = result.target_prompt_logprobs.to_numpy()
    assert found.shape == (4, 2)
    assert found[1, 0] == pytest.approx(float(plain[1][7]), abs=1e-4)
    assert found[3].tolist() == pytest.approx([float(plain[3][8]), float(plain[3][9])], abs=1e-4)
    assert found[0].tolist() == [0.0, 0.0] and found[1, 1] == 0.0


@pytest.mark.since(0, 29)
def test_chosen_tokens_may_be_sparse(sampler, base_logprobs):
    torch = pytest.importorskip("torch")
    ids = torch.full((4, 9), -1, dtype=torch.int64)
    ids[3, 5] = 33
    if not hasattr(TensorData, "from_torch_sparse"):
        pytest.skip("no sparse tensors")
    target = TensorData.from_torch_sparse(ids, pad_value=-1)
    assert target.sparse_crow_indices is not None
    result = sampler.sample(prompt(), 1, params(), target_prompt_logprobs=target).result()
    returned = result.target_prompt_logprobs
    assert returned.sparse_col_indices is not None
    assert returned.to_torch()[3, 5].item() == pytest.approx(float(base_logprobs(PROMPT)[3][33]), abs=1e-4)


@pytest.mark.since(0, 33)
def test_alternatives_to_the_prompt_and_scores_of_its_end(sampler, base_logprobs):
    result = sampler.sample(
        prompt(),
        1,
        params(seed=4),
        include_prompt_logprobs=True,
        prompt_alt_tokens_k=3,
        prompt_logprobs_last_n=2,
    ).result()
    plain = base_logprobs(PROMPT)
    assert result.prompt_logprobs[:3] == [None, None, None]
    assert result.prompt_logprobs[3:] == pytest.approx([float(plain[2][40]), float(plain[3][50])], abs=1e-4)
    tokens = result.prompt_alt_tokens.tokens.to_numpy()
    logprobs = result.prompt_alt_tokens.logprobs.to_numpy()
    assert tokens.shape == logprobs.shape == (4, 3)
    np.testing.assert_allclose(logprobs, plain[np.arange(4)[:, None], tokens], atol=1e-4)
    again = sampler.sample(prompt(), 1, params(seed=4), prompt_alt_tokens_k=3).result()
    assert (again.prompt_alt_tokens.tokens.to_numpy() == tokens).all()


def test_many_samples_at_once(sampler):
    waiting = [sampler.sample(prompt([seed + 1, 2, 3]), 2, params(seed=seed)) for seed in range(80)]
    results = [future.result() for future in waiting]
    assert all(len(result.sequences) == 2 for result in results)
    again = sampler.sample(prompt([41, 2, 3]), 2, params(seed=40)).result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in results[40].sequences]


def test_a_sampling_client_goes_through_pickle(sampler):
    copy = pickle.loads(pickle.dumps(sampler))
    expected = sampler.sample(prompt(), 1, params(seed=2)).result().sequences[0].tokens
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: copy.sample(prompt(), 1, params(seed=2)).result(), range(4)))
    assert all(result.sequences[0].tokens == expected for result in found)


@pytest.mark.since(0, 34)
def test_a_handle_gives_the_same_sampler(sampler):
    other = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    expected = sampler.sample(prompt(), 1, params(seed=2)).result().sequences[0].tokens
    assert other.sample(prompt(), 1, params(seed=2)).result().sequences[0].tokens == expected


def test_a_cancelled_sample_leaves_the_others_alone(sampler):
    long = sampler.sample(prompt(), 8, params(max_tokens=200))
    short = sampler.sample(prompt(), 1, params(seed=1))
    (long.future() if hasattr(long, "future") else long).cancel()
    assert len(short.result().sequences[0].tokens) == 4


def test_base_model_and_unknown_checkpoints(service, sdk, sampler):
    assert sampler.get_base_model() == MODEL
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        now(service.create_sampling_client(model_path=f"{sdk.scheme}://no-run:train:0/weights/nothing"))
    with pytest.raises(tinker.BadRequestError, match="is not served here"):
        now(service.create_sampling_client(base_model="another/model"))


@pytest.mark.since(0, 36)
def test_what_stable_reinforce_would_need_is_refused_at_once(service):
    recording = now(service.create_sampling_client(base_model=MODEL, record_stability_info=True))
    with pytest.raises(tinker.BadRequestError, match="no stable_reinforce here"):
        recording.sample(prompt(), 1, params()).result()


def test_bad_samples_are_refused_and_the_next_one_works(sampler):
    for bad, settings, message in (
        ([1, 10**6], {}, "outside of the vocabulary"),
        ([], {}, "no tokens"),
        ([1] * 300, {}, "takes at most 256"),
        ([1] * 250, {"max_tokens": 100}, "goes beyond"),
    ):
        with pytest.raises(tinker.BadRequestError, match=message):
            sampler.sample(prompt(bad), 1, params(**settings)).result()
    assert len(sampler.sample(prompt(), 1, params()).result().sequences[0].tokens) == 4


async def test_async_use(service):
    sampler = await service.create_sampling_client_async(base_model=MODEL)
    results = await asyncio.gather(*(sampler.sample_async(prompt(), 1, params(seed=i)) for i in range(6)))
    assert len(results) == 6
