"""What is decided before anything is loaded: how many ranks, on which device, and what is refused."""

from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plan as planning
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import ServerConfig, parse_config
from twinkle.server.engine.worker import build_worker
from twinkle.server.local import ServiceClient
from twinkle.server.plan import make_plan


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return str(tmp_path)


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is taken to be installed: importing it takes many seconds."""
    monkeypatch.setattr(planning.plugins, "look_up", lambda _group, _name: object)


def config(model: str, **settings: object) -> ServerConfig:
    return parse_config({"model": {"model_id": model, **settings}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", 2),
        ("pipeline_parallel_size", 2),
        ("expert_parallel_size", 2),
        ("sequence_parallel", True),
    ],
)
def test_parallelism_without_megatron_is_refused_by_name(model: str, name: str, value: object):
    with pytest.raises(InvalidRequest, match=rf"model\.{name}: \w+: .*use_megatron: true"):
        make_plan(config(model, **{name: value}))


def test_what_makes_one_rank_is_no_parallelism(model: str):
    plan = make_plan(config(model, tensor_parallel_size=1, sequence_parallel=False))
    assert plan.num_ranks == 1 and plan.model.rendezvous is None


@pytest.mark.usefixtures("megatron")
def test_the_ranks_of_megatron_and_their_bundles(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_gpus", lambda _config: 8)
    plan = make_plan(
        config(
            model,
            use_megatron=True,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            expert_parallel_size=4,
            sequence_parallel=True,
        )
    )
    assert plan.num_ranks == 8  # experts over the two ranks that share a layer and two more like them
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 8
    assert plan.model.device == "cuda"
    assert (plan.model.expert_parallel_size, plan.model.sequence_parallel) == (4, True)


@pytest.mark.usefixtures("megatron")
def test_fewer_gpus_than_ranks_is_an_error_and_none_is_the_cpu(model: str, monkeypatch: pytest.MonkeyPatch):
    settings = config(model, use_megatron=True, tensor_parallel_size=4)
    monkeypatch.setattr(planning, "num_gpus", lambda _config: 2)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size.* 4 ranks.* 2 can be used.*num_gpus: 0"):
        make_plan(settings)
    monkeypatch.setattr(planning, "num_gpus", lambda _config: 0)
    plan = make_plan(settings)
    assert plan.model.device == "cpu" and plan.bundles == [{"CPU": 1.0}] * 4


@pytest.mark.usefixtures("megatron")
def test_local_mode_is_one_process(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_gpus", lambda _config: 0)
    with pytest.raises(InvalidRequest, match="2 ranks, each a process of its own"):
        ServiceClient(config(model, use_megatron=True, tensor_parallel_size=2)).create_lora_training_client(
            model
        )


async def test_the_first_rank_alone_has_a_sampler():
    first, second = [
        build_worker(ModelConfig(Path("fake"), tensor_parallel_size=2, rank=rank), "fake", "fake")
        for rank in (0, 1)
    ]
    await first.remove_sampler_adapter("none")
    with pytest.raises(AssertionError, match="only rank 0"):
        await second.remove_sampler_adapter("none")
    await second.close()
    await first.close()
