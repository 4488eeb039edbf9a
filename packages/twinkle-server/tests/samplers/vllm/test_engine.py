"""The vLLM engine: what is its own, and that it agrees with the Transformers engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sampling_contract import ask, greedy, plain_logprobs, prompts
from vllm_engines import require_vllm

from twinkle.protocol.errors import InvalidRequest, NotFound, ServerFault
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.samplers.transformers import TransformersEngine
from twinkle.server.samplers.vllm import adapters

require_vllm()


@pytest.fixture(scope="module")
def transformers_engine(backend, model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(backend.loaded, ModelConfig(model_dir))
    yield engine
    engine.close()


def test_greedy_tokens_and_logprobs_equal_the_transformers_engines(engine, transformers_engine, states):
    for name, state in states.items():
        transformers_engine.add_adapter(name, state)
    cases = [(prompt, [None, *states][i % 4]) for i, prompt in enumerate(prompts(12, seed=7))]
    both = [
        [ask(one, p, a, temperature=0, max_tokens=20, stop=[], topk_sample_logprobs=2) for p, a in cases]
        for one in (engine, transformers_engine)
    ]
    for ours, theirs in zip(*both, strict=True):
        [mine], [other] = ours.result(60).sequences, theirs.result(60).sequences
        assert mine.tokens == other.tokens and mine.stop_reason == other.stop_reason
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_allclose(mine.topk_logprobs.logprobs, other.topk_logprobs.logprobs, atol=1e-4)


def test_eight_adapters_and_the_base_model_in_one_batch(engine, random_state, peft_model):
    """As many as have a place, of different ranks, half of them on the output head; base rows get none of them."""
    specs = [
        AdapterSpec(rank=(2, 4, 8, 16)[i % 4], seed=20 + i, alpha=8, train_unembed=i % 2 == 0)
        for i in range(8)
    ]
    made = {f"mixed-{i}": random_state(spec) for i, spec in enumerate(specs)}
    try:
        for name, state in made.items():
            engine.add_adapter(name, state)
        names = [None, *made]
        cases = [(name, prompt) for prompt in prompts(2, seed=3) for name in names]
        pending = [
            ask(engine, p, a, temperature=0.8, top_p=0.9, seed=i, max_tokens=8, stop=[], prompt_logprobs=True)
            for i, (a, p) in enumerate(cases)
        ]
        models = {name: peft_model(made[name] if name else None) for name in names}
        for (name, prompt), future in zip(cases, pending, strict=True):
            response = future.result(60)
            [sequence] = response.sequences
            whole = prompt + sequence.tokens
            tempered = plain_logprobs(models[name], whole, 0.8)
            drawn = [tempered[len(prompt) - 1 + i, token].item() for i, token in enumerate(sequence.tokens)]
            np.testing.assert_allclose(sequence.logprobs, drawn, atol=1e-4)
            plain = plain_logprobs(models[name], prompt)
            own = [plain[i, token].item() for i, token in enumerate(prompt[1:])]
            np.testing.assert_allclose(np.array(response.prompt_logprobs[1:], float), own, atol=1e-4)
    finally:
        for name in made:
            engine.remove_adapter(name)


def test_an_id_that_comes_again_is_the_new_adapter(engine, random_state, peft_model):
    for seed in (31, 32):
        state = random_state(AdapterSpec(rank=4, seed=seed))
        engine.add_adapter("again", state)
        sampled = ask(engine, [5, 6, 7], "again", temperature=0, max_tokens=12, stop=[]).result(60)
        assert sampled.sequences[0].tokens == greedy(peft_model(state), [5, 6, 7], 12)
        engine.remove_adapter("again")


def test_what_vllm_cannot_serve_is_refused_at_publication_and_nothing_else_is_disturbed(
    engine, random_state, monkeypatch: pytest.MonkeyPatch
):
    going_on = ask(engine, [1, 2], "small", max_tokens=100, stop=[])
    state = random_state(AdapterSpec(rank=4))
    too_high = AdapterState(AdapterSpec(rank=32), state.target_modules, state.weights)
    with pytest.raises(InvalidRequest, match="rank 32, and the sampler takes up to 16"):
        engine.add_adapter("high", too_high)
    elsewhere = AdapterState(
        state.spec, [*state.target_modules, "model.layers.0.self_attn.no_proj"], state.weights
    )
    with pytest.raises(InvalidRequest, match="no_proj, which this model doesn't have"):
        engine.add_adapter("elsewhere", elsewhere)
    experts = AdapterState(state.spec, ["model.layers.0.mlp.experts.down_proj"], {})
    with pytest.raises(InvalidRequest, match="routed experts"):
        engine.add_adapter("experts", experts)
    name = next(name for name in state.weights if "q_proj.lora_B" in name)
    narrow = AdapterState(state.spec, state.target_modules, state.weights | {name: state.weights[name][:-7]})
    with pytest.raises(InvalidRequest, match="lora_B of model.layers.0.self_attn.q_proj has shape"):
        engine.add_adapter("narrow", narrow)
    # And what vLLM itself refuses.
    monkeypatch.setattr(adapters, "check", lambda *_: None)
    high = random_state(AdapterSpec(rank=32))
    with pytest.raises(InvalidRequest, match="vllm refuses 'broken'.*rank"):
        engine.add_adapter("broken", high)
    assert {"high", "elsewhere", "experts", "narrow", "broken"}.isdisjoint(engine.resident_adapters())
    assert len(going_on.result(60).sequences[0].tokens) == 100


def test_weights_that_are_not_finite_are_refused_when_sampled(engine, random_state):
    state = random_state(AdapterSpec(rank=4))
    next(iter(state.weights.values()))[0, 0] = np.nan
    engine.add_adapter("lost", state)
    with pytest.raises(InvalidRequest, match="not finite"):
        ask(engine, [1, 2], "lost").result(10)
    engine.remove_adapter("lost")


def test_files_of_adapters_are_private_and_go_with_them(engine, states):
    roots = engine._files.roots
    assert all(root.stat().st_mode & 0o777 == 0o700 for root in roots)

    def directories() -> set[Path]:
        return {path for root in roots for path in root.iterdir() if path.is_dir()}

    before = directories()
    engine.add_adapter("filed", states["small"])
    assert len(directories() - before) == 1
    running = ask(engine, [1], "filed", max_tokens=200, stop=[])
    engine.remove_adapter("filed")
    assert len(running.result(60).sequences[0].tokens) == 200
    engine._wait_for(settled())
    assert directories() == before
    with pytest.raises(NotFound):
        ask(engine, [1], "filed").result(10)


async def settled() -> None:
    """Until removals that have been begun are done."""
    await asyncio.gather(*(task for task in asyncio.all_tasks() if "_remove_from_vllm" in repr(task)))


def test_a_temperature_beyond_vllms_range_is_refused(engine):
    with pytest.raises(InvalidRequest, match="temperature: 2.5; the vllm engine takes up to 2"):
        ask(engine, [1, 2], temperature=2.5).result(10)


def test_questions_that_need_whole_distributions_are_refused_for_long_prompts(engine, monkeypatch):
    monkeypatch.setattr("twinkle.server.samplers.vllm.prompts.MAX_TABLE", 512 * 9)
    assert ask(engine, [1] * 10, prompt_alt_tokens_k=2, max_tokens=1).result(60).prompt_alt_tokens is not None
    with pytest.raises(InvalidRequest, match="prompt_alt_tokens_k: for prompts of up to 10 tokens"):
        ask(engine, [1] * 11, prompt_alt_tokens_k=2, max_tokens=1).result(10)


def test_a_request_that_is_cancelled_ends_and_its_adapter_may_go(engine, states):
    engine.add_adapter("doomed", states["other"])
    doomed = [
        ask(engine, [4] * 9, "doomed", max_tokens=240, num_samples=90, stop=[], request_id=f"doomed-{i}")
        for i in range(2)
    ]
    going_on = ask(engine, [1, 2, 3], "small", seed=42, num_samples=2, max_tokens=30, stop=[])
    for request_id in ("", "unknown", "doomed-0", "doomed-1"):
        engine.cancel(request_id)
    engine.remove_adapter("doomed")
    for future in doomed:
        with pytest.raises(CancelledError):
            future.result(60)
    alone = ask(engine, [1, 2, 3], "small", seed=42, num_samples=2, max_tokens=30, stop=[])
    both = [[s.tokens for s in future.result(60).sequences] for future in (going_on, alone)]
    assert both[0] == both[1]


def test_a_closed_engine_cancels_what_is_unfinished_and_accepts_nothing(model_dir: Path):
    from twinkle.server.samplers.vllm import VllmEngine

    engine = VllmEngine.create(ModelConfig(model_dir, max_lora_rank=8, max_sampler_adapters=2), None)
    roots = engine._files.roots
    pending: list[Any] = [ask(engine, [1], max_tokens=200, num_samples=3, stop=[]) for _ in range(60)]
    engine.close()
    assert {type(future.exception(10)) for future in pending} <= {CancelledError, type(None)}
    assert CancelledError in {type(future.exception(10)) for future in pending}
    assert isinstance(ask(engine, [1], max_tokens=1).exception(10), ServerFault)
    assert not any(root.exists() for root in roots)
    engine.cancel("unknown")
    engine.close()
