"""A base that is spread over ranks: each holds its part, and all give the numbers of one that holds the whole.

`test_replicas.py` runs the contract suite and its own tests on such ranks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import published_models
import pytest
import random_models
import replica_ranks
import tiny_moe
import torch
import transformers
from rank_processes import RankProcesses, RemoteBackend

from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode
from twinkle.server.backends.contract.parts import assert_same_state
from twinkle.server.backends.hf.base_model import load_base_model
from twinkle.server.backends.hf.shards import part_of
from twinkle.server.backends.lora.losses import custom_check
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, CustomLoss, ModelConfig, Row
from twinkle.server.backends.transformers import TransformersBackend
from twinkle.server.backends.transformers.sharding import check_shared, decoder_layers

SPECS = {
    "all": AdapterSpec(rank=4, seed=1),
    "head": AdapterSpec(rank=2, seed=2, train_attn=False, train_mlp=False),
    "attention": AdapterSpec(rank=4, seed=3, train_mlp=False, train_unembed=False),
}
SMALL = {name: size for name, size in tiny_moe.SIZES.items() if name != "moe_intermediate_size"}


def mixtral(directory: Path) -> Path:
    """Of 3 experts, which two ranks can't share evenly."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)
    return random_models.save(config, directory)


def opt(directory: Path) -> Path:
    """Feed-forward layers in the decoder layer itself, and positions looked up beside the tokens."""
    config = transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
    return random_models.save(config, directory)


def falcon(directory: Path) -> Path:
    """It adds in place."""
    sizes = {name: size for name, size in SMALL.items() if "key_value" not in name and name != "head_dim"}
    config = transformers.FalconConfig(**sizes, parallel_attn=True, multi_query=True, bias=True)
    return random_models.save(config, directory)


def gpt_oss(directory: Path) -> Path:
    """Experts that are not plain gated layers, and sinks: parameters of an attention module itself."""
    config = transformers.GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    return random_models.save(config, directory)


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen3-moe": tiny_moe.save,
    "mixtral": mixtral,
    "opt": opt,
    "falcon": falcon,
    "gpt-oss": gpt_oss,
    **{
        name: lambda directory, name=name: published_models.save(name, directory)
        for name in published_models.MODELS
    },
}


@pytest.fixture(scope="module")
def group(tiny_model_dir: Path) -> Iterator[RankProcesses]:
    """Whatever model is asked for, on two ranks."""
    with replica_ranks.start(ModelConfig(tiny_model_dir, data_parallel_size=2, shard_base=True)) as started:
        yield started


@pytest.fixture
def pair(
    group: RankProcesses, tiny_model_dir: Path, add_trained: Any
) -> Iterator[tuple[TransformersBackend, RemoteBackend]]:
    """One rank, and two with a part each, with the same adapters."""
    alone, sharded = TransformersBackend(ModelConfig(tiny_model_dir)), group.backend()
    for backend in (alone, sharded):
        add_trained(backend, SPECS)
    yield alone, sharded
    sharded.close()


def compute(
    group: RankProcesses, backend: RemoteBackend, shares: list[list[list[Row]]]
) -> list[list[list[Any]]]:
    """Each rank's results of the micro-batches that it is given."""
    return group.call_each([("do", backend.number, "forward_backward", share) for share in shares])


def states(backend: Any) -> list[AdapterState]:
    return [backend.export_adapter(name, with_optimizer=True, with_gradients=True) for name in SPECS]


def assert_close(mine: AdapterState, theirs: AdapterState) -> None:
    """Gradients within 1e-5 of each matrix's norm."""
    assert mine.gradients is not None and theirs.gradients is not None
    for name, expected in theirs.gradients.items():
        difference = np.linalg.norm(mine.gradients[name] - expected)
        assert difference <= 1e-5 * np.linalg.norm(expected), name


# ---------------------------------------------------------------- what each rank holds


@pytest.mark.parametrize("name", ["dense", "tied", *MODELS])
def test_parts_make_the_whole_and_each_rank_holds_its_own(
    name: str, group: RankProcesses, tmp_path: Path, request: pytest.FixtureRequest, random_row: Any
) -> None:
    if name in MODELS:
        path = MODELS[name](tmp_path)
    else:
        path = request.getfixturevalue({"dense": "tiny_model_dir", "tied": "tiny_tied_model_dir"}[name])
    whole = load_base_model(ModelConfig(path))
    loaded = [
        load_base_model(ModelConfig(path, data_parallel_size=2, shard_base=True, rank=rank))
        for rank in range(2)
    ]
    # Nothing of it is the whole, a rank's part is about half, and together they are what is in the files.
    assert all(parameter.is_meta for one in loaded for parameter in one.model.parameters())
    for parameter_name, expected in whole.model.named_parameters():
        parts = []
        for one in loaded:
            assert one.shards is not None
            parts.append(one.shards.parts[one.model.get_parameter(parameter_name)])
        assert torch.equal(torch.cat(parts), expected), parameter_name
    for buffer_name, expected in whole.model.named_buffers():
        assert torch.equal(loaded[0].model.get_buffer(buffer_name), expected), buffer_name
    assert (loaded[0].targets, loaded[0].experts) == (whole.targets, whole.experts)
    for fact in ("vocab_size", "export", "trainable", "overhead_tokens", "eos_token_ids"):
        assert getattr(loaded[1].info, fact) == getattr(whole.info, fact), fact

    sizes = [parameter.nbytes for parameter in whole.model.parameters()]
    backend = group.backend(replace(group.config, path=path))
    first, second = group.held_by_each_rank()
    # Matrices of an odd number of rows are half a row off; the rank with less fills its part up.
    slack = sum(parameter[0].nbytes for parameter in whole.model.parameters())
    assert (
        abs(first.base_bytes - sum(sizes) / 2) <= slack and abs(second.base_bytes - sum(sizes) / 2) <= slack
    )
    assert first.base_bytes + second.base_bytes == sum(sizes)
    backend.close()


def test_between_passes_nothing_is_gathered(tiny_model_dir: Path, random_row: Any) -> None:
    size = sum(
        parameter.nbytes for parameter in load_base_model(ModelConfig(tiny_model_dir)).model.parameters()
    )
    rows = [random_row("a", 9, seed) for seed in range(4)]
    config = ModelConfig(tiny_model_dir, data_parallel_size=2, shard_base=True)
    with replica_ranks.start(config) as started:
        backend = started.backend()
        backend.add_adapter("a", AdapterSpec(rank=1))
        for micro_batches in ([rows], [[replace(row, forward_only=True) for row in rows]]):
            backend.forward_backward(micro_batches)
            for held in started.held_by_each_rank():
                assert held.base_bytes == size / 2
                assert held.live_bytes < 0.75 * size, "its half, an adapter, and little else"


def test_parts_are_as_fsdp_cuts() -> None:
    for rows in range(1, 12):
        for count in (2, 3, 4):
            expected = [len(part) for part in torch.arange(rows).chunk(count)]
            found = [end - start for start, end in (part_of(rows, rank, count) for rank in range(count))]
            assert found == expected + [0] * (count - len(expected))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", MODELS)
def test_other_models_have_the_numbers_of_one_rank(
    name: str, group: RankProcesses, tmp_path: Path, add_trained: Any, random_row: Any
) -> None:
    path = MODELS[name](tmp_path)
    specs = {"a": AdapterSpec(rank=3, seed=1), "b": AdapterSpec(rank=2, seed=2)}
    alone, backend = TransformersBackend(ModelConfig(path)), group.backend(replace(group.config, path=path))
    rows = [
        random_row(who, length, length, vocab_size=128)
        for who, length in zip("ababa", (9, 14, 5, 11, 7), strict=True)
    ]
    for one in (alone, backend):
        add_trained(one, specs)
    for mine, theirs in zip(
        *(
            [result for results in one.forward_backward([rows]) for result in results]
            for one in (backend, alone)
        ),
        strict=True,
    ):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
    for who in specs:
        assert_close(*(one.export_adapter(who, True, True) for one in (backend, alone)))
    backend.close()


# ---------------------------------------------------------------- in step


@pytest.mark.parametrize(
    "shares",
    [
        # Adapters by micro-batch, of each rank; in capitals: no gradient.
        [["all", "all", "attention"], []],
        [[], ["head"]],
        [["head"], ["all", "attention"]],
        [["ALL", "head"], ["attention"]],
        [["ALL", "HEAD"], ["ATTENTION", "ALL", "ALL"]],
        [["head", "HEAD", "head"], ["HEAD", "all"]],
    ],
    ids=str,
)
def test_whatever_rows_the_ranks_have_they_gather_the_same_layers(
    shares: list[list[str]],
    group: RankProcesses,
    pair: tuple[TransformersBackend, RemoteBackend],
    random_row: Any,
) -> None:
    alone, sharded = pair
    given = [
        [
            [
                replace(random_row(name.lower(), 5 + 3 * i, seed=10 * rank + i), forward_only=name.isupper())
                for _ in range(2)
            ]
            for i, name in enumerate(names)
        ]
        for rank, names in enumerate(shares)
    ]
    found = compute(group, sharded, given)
    for mine, rows in zip(found, given, strict=True):
        expected = alone.forward_backward(rows)
        for one, other in zip(mine, expected, strict=True):
            for result, theirs in zip(one, other, strict=True):
                assert result.loss == pytest.approx(theirs.loss, rel=1e-5)
                np.testing.assert_allclose(result.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
    for one, other in zip(states(sharded), states(alone), strict=True):
        assert_close(one, other)


LOGPROBS = CustomLossInput(name="logprobs", rank=1)
# It names nothing that isn't allowed; that there is no third dimension shows when it is run.
TOO_DEEP = CustomLossGraph(
    nodes=[
        CustomLossNode(op="placeholder", name="lp", target="logprobs", args=[], kwargs={}),
        CustomLossNode(op="call_method", name="x", target="sum", args=[{"ref": "lp"}], kwargs={"dim": [3]}),
        CustomLossNode(
            op="output",
            name="output",
            target="output",
            args=[{"tuple": [{"ref": "x"}, {"dict": {}}]}],
            kwargs={},
        ),
    ]
)


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_fails_on_one_rank_fails_the_pass_on_all(
    bad_rank: int,
    place: int,
    group: RankProcesses,
    pair: tuple[TransformersBackend, RemoteBackend],
    random_row: Any,
) -> None:
    _, sharded = pair
    before = states(sharded)
    custom_check.check([LOGPROBS], TOO_DEEP)
    shares = [[[random_row("all", 6, seed=i)] for i in range(count)] for count in (2, 3)]
    good = shares[bad_rank][place][0]
    loss = CustomLoss("l", "too deep", (LOGPROBS,), TOO_DEEP)
    shares[bad_rank][place].append(replace(good, loss_fn="custom", custom_loss=loss))
    with pytest.raises(InvalidRequest, match="sum"):
        compute(group, sharded, shares)
    for mine, theirs in zip(states(sharded), before, strict=True):
        assert_same_state(mine, theirs)
    shares[bad_rank][place].pop()
    compute(group, sharded, shares)


def test_layers_that_share_a_parameter_are_refused(tiny_model_dir: Path) -> None:
    loaded = load_base_model(ModelConfig(tiny_model_dir, data_parallel_size=2, shard_base=True))
    first, second = (loaded.model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in range(2))
    second.weight = first.weight
    with pytest.raises(InvalidRequest, match=r"shard_base: Qwen3ForCausalLM .* share a parameter"):
        check_shared(loaded.model, decoder_layers(loaded.model))
