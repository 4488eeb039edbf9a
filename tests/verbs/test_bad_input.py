"""Bad input: a sentence that names the field and what is allowed; nothing lost, the next request works."""

import math

import numpy as np
import pytest
from peft_reference import MODEL, VOCAB, random_batch

from twinkle.protocol.errors import InvalidRequest, NotFound, RequestFailed, TwinkleError
from twinkle.protocol.types import Datum, ModelInput, SamplingParams

CONTEXT = 256


def datum(tokens, targets=None, weights=None) -> Datum:
    targets = tokens if targets is None else targets
    weights = [1.0] * len(targets) if weights is None else weights
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})


BAD_PASSES = {
    "vocabulary": (
        [datum([1, VOCAB])],
        "cross_entropy",
        rf"data\[0\]\.model_input: token id {VOCAB} is outside.*0 to 511",
    ),
    "target vocabulary": (
        [datum([1, 2], [3, 70_000])],
        "cross_entropy",
        r"data\[0\]\.loss_fn_inputs\.target_tokens: token id 70000 is outside",
    ),
    "negative target": ([datum([1, 2], [3, -100])], "cross_entropy", "mask tokens with a weight of 0"),
    "too long": (
        [datum([1] * (CONTEXT + 1))],
        "cross_entropy",
        rf"{CONTEXT + 1} tokens, but .* at most {CONTEXT}",
    ),
    "weights of another length": (
        [datum([1, 2, 3], weights=[1.0])],
        "cross_entropy",
        r"data\[0\]\.loss_fn_inputs\.weights: shape \[1\], but target_tokens has \[3\]",
    ),
    "nan": ([datum([1, 2], weights=[1.0, math.nan])], "cross_entropy", r"weights: entry 1 is nan"),
    "no data": ([], "cross_entropy", "data: no datums were sent"),
    "empty sequence": ([datum([])], "cross_entropy", r"data\[0\]\.model_input: no tokens"),
    "unknown loss": (
        [datum([1, 2])],
        "cross_entropi",
        "loss_fn: 'cross_entropi' is not known here.*did you mean 'cross_entropy'",
    ),
    "missing weights": (
        [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, 1]})],
        "cross_entropy",
        r"data\[0\]\.loss_fn_inputs: weights missing",
    ),
    "missing targets": (
        [Datum(ModelInput.from_ints([1, 2]), {"weights": [1.0, 1.0]})],
        "cross_entropy",
        "target_tokens missing",
    ),
}


@pytest.mark.parametrize("case", BAD_PASSES)
def test_a_bad_pass_is_refused_and_the_run_goes_on(verbs, case: str):
    data, loss_fn, message = BAD_PASSES[case]
    client = verbs.connect("bad").create_lora_training_client(MODEL, rank=2, seed=1)
    batch = random_batch(1, (8,))
    before = client.forward_backward(batch).metrics["loss:sum"]
    with pytest.raises(InvalidRequest, match=message):
        client.forward_backward(data, loss_fn).result()
    assert client.forward(batch).metrics["loss:sum"] == pytest.approx(before, rel=1e-6)
    assert client.optim_step().metrics["grad_norm:mean"] > 0
    client.unload().result()


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a" * 200, "x/../../y", "unnamed-1"])
def test_a_name_is_never_a_path(verbs, name: str):
    client = verbs.connect("bad").create_lora_training_client(MODEL, rank=2)
    with pytest.raises(InvalidRequest, match="path: "):
        client.save_state(name).result()
    assert client.save_state("fine").path.endswith("/weights/fine")
    with pytest.raises(RequestFailed, match="already has a checkpoint 'fine'.*overwrite=True"):
        client.save_state("fine").result()
    assert client.save_state("fine", overwrite=True).path
    client.unload().result()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": "Nobody/Nothing-7B"}, "base_model: 'Nobody/Nothing-7B' is not"),
        ({"base_model": MODEL, "rank": 0}, "rank: 0 is not possible; choose 1 to 128"),
        ({"base_model": MODEL, "rank": 129}, "rank: 129 is not possible; choose 1 to 128"),
        (
            {"base_model": MODEL, "train_attn": False, "train_mlp": False, "train_unembed": False},
            "nothing would be trained",
        ),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(verbs, arguments: dict, message: str):
    with pytest.raises(InvalidRequest, match=message):
        verbs.connect("bad").create_lora_training_client(**arguments)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(max_tokens=1), "prompt: no tokens"),
        ([VOCAB + 5], SamplingParams(max_tokens=1), "outside of the vocabulary"),
        ([1] * 250, SamplingParams(max_tokens=20), "max_tokens: 20 after a prompt of 250 tokens"),
        ([1], SamplingParams(max_tokens=1, stop=[""]), "stop: '' can't end a text"),
        ([1], SamplingParams(max_tokens=1, stop=[VOCAB]), "stop: 512 can't end a text"),
    ],
)
def test_a_bad_sample_is_refused_and_the_next_one_works(verbs, prompt, params, message: str):
    sampler = verbs.connect("bad").create_sampling_client(base_model=MODEL)
    with pytest.raises(InvalidRequest, match=message):
        sampler.sample(prompt, 1, params).result()
    assert len(sampler.sample([1, 2], 1, SamplingParams(max_tokens=3, stop=[])).sequences[0].tokens) == 3


def test_a_failure_nobody_looked_at_is_raised_by_the_next_call(verbs):
    client = verbs.connect("bad").create_lora_training_client(MODEL, rank=2)
    pending = client.forward_backward([datum([1, VOCAB])])
    pending.wait_done()
    with pytest.raises(InvalidRequest, match="outside of the vocabulary"):
        client.optim_step()
    assert client.optim_step().metrics["grad_norm:mean"] == 0.0  # raised once; the run goes on


def test_nothing_can_be_loaded_from_a_checkpoint_of_another_shape(verbs):
    service = verbs.connect("bad")
    small = service.create_lora_training_client(MODEL, rank=2)
    large = service.create_lora_training_client(MODEL, rank=4, seed=3)
    path = small.save_state("small").path
    batch = random_batch(4, (9,))
    before = large.forward(batch).metrics["loss:sum"]
    with pytest.raises(TwinkleError, match="rank"):
        large.load_state(path).result()
    assert large.forward(batch).metrics["loss:sum"] == before
    with pytest.raises(NotFound, match="there is no checkpoint"):
        service.create_training_client_from_state("twinkle://nowhere")
    assert np.isfinite(before)


def test_text_where_tokens_are_wanted_is_said_to_be_text(verbs):
    sampler = verbs.connect("bad").create_sampling_client(base_model=MODEL)
    with pytest.raises(InvalidRequest, match="'Who are you.'; encode text with a Template"):
        sampler.sample("Who are you?")
    client = verbs.connect("bad").create_lora_training_client(MODEL, rank=2)
    with pytest.raises(InvalidRequest, match=r"data\[0\]: str is neither a Datum nor a feature"):
        client.forward_backward(["Who are you?"])
    with pytest.raises(InvalidRequest, match=r"encode"):
        client.forward_backward([{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(InvalidRequest, match="learning_rate: Input should be greater than or equal to 0"):
        client.optim_step(learning_rate=-1.0)
    assert client.forward_backward(random_batch(1, (5,))).metrics["loss:sum"] != 0
