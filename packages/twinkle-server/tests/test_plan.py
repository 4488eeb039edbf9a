"""What is decided before anything is loaded: how many ranks, on which device, and what is refused."""

from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import local
from twinkle.server import plan as planning
from twinkle.server.backends.protocol import AdapterSpec, ModelConfig
from twinkle.server.config import RaySection, SamplerSection, ServerConfig, parse_config
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


def test_determinism_is_off_unless_asked_for(model: str):
    assert not make_plan(config(model)).model.deterministic
    assert make_plan(config(model, deterministic=True)).model.deterministic


def test_what_makes_one_rank_is_no_parallelism(model: str):
    plan = make_plan(config(model, tensor_parallel_size=1, sequence_parallel=False))
    assert plan.num_ranks == 1 and plan.model.rendezvous is None


@pytest.mark.usefixtures("megatron")
def test_the_ranks_of_megatron_and_their_bundles(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_gpus", lambda *_: 8)
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
    assert plan.bundles == [{"CPU": 2.0, "GPU": 2.0}] * 4, "two that share layers on one machine"
    assert plan.model.device == "cuda"
    assert (plan.model.expert_parallel_size, plan.model.sequence_parallel) == (4, True)


@pytest.mark.usefixtures("megatron")
def test_fewer_gpus_than_ranks_is_an_error_and_none_is_the_cpu(model: str, monkeypatch: pytest.MonkeyPatch):
    settings = config(model, use_megatron=True, tensor_parallel_size=4)
    monkeypatch.setattr(planning, "num_gpus", lambda *_: 2)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel_size.* 4 ranks.* 2 can be used.*num_gpus: 0"):
        make_plan(settings)
    monkeypatch.setattr(planning, "num_gpus", lambda *_: 0)
    plan = make_plan(settings)
    assert plan.model.device == "cpu" and plan.bundles == [{"CPU": 4.0}, {"CPU": 1.0}], "and a sampler"


@pytest.mark.usefixtures("megatron")
def test_local_mode_is_one_process(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "num_gpus", lambda *_: 0)
    with pytest.raises(InvalidRequest, match="2 ranks, each a process of its own"):
        ServiceClient(config(model, use_megatron=True, tensor_parallel_size=2)).create_lora_training_client(
            model
        )


async def test_a_rank_without_a_sampler_trains_alone():
    worker = build_worker(ModelConfig(Path("fake"), tensor_parallel_size=2, rank=1), "fake", None)
    await worker.add_adapter("a", AdapterSpec(rank=1))
    assert worker.samplers == "nowhere"
    with pytest.raises(InvalidRequest, match="no samplers"):
        await worker.remove_sampler_adapter("none")
    await worker.close()


# ---------------------------------------------------------------- data-parallel ranks


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(planning, "_found_gpus", lambda: count)


def first_yaml(model: str, **more: object) -> ServerConfig:
    """The mission's first one, with a model that is there."""
    return parse_config(
        {
            "model": {"model_id": model, "use_megatron": False, "torch_dtype": "bfloat16"} | more,
            "server": {"host": "0.0.0.0", "port": 8000, "num_replicas": 1},
            "ray": {"num_gpus": 4},
        }
    )


def test_all_gpus_that_are_asked_for_train_and_sample(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 8)
    plan = make_plan(first_yaml(model))
    assert plan.model.data_parallel_size == plan.num_ranks == 4 and plan.shares_rows
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4
    assert [plan.sampler_of(rank) for rank in range(4)] == ["transformers"] * 4
    everything = make_plan(config(model))
    assert everything.num_ranks == 8, "all that are found"


@pytest.mark.usefixtures("megatron")
def test_copies_are_what_trainer_parallelism_leaves_room_for(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 8)
    plan = make_plan(config(model, use_megatron=True, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert (plan.model.data_parallel_size, plan.num_ranks, plan.shares_rows) == (2, 8, False)
    assert plan.samplers is None and plan.sampler_of(0) is None, "a rank never holds the model once more"
    assert "It only trains: the trainer takes all GPUs" in plan.describe()[-1]


def test_more_gpus_than_there_are_is_an_error_with_two_ways_out(model: str, monkeypatch: pytest.MonkeyPatch):
    for found in (0, 2):
        with_gpus(monkeypatch, found)
        with pytest.raises(InvalidRequest) as refused:
            make_plan(first_yaml(model))
        assert f"ray.num_gpus: 4 GPUs are to be used, but this machine has {found};" in refused.value.message
        assert "ray.num_gpus: 0, or TWINKLE_DEVICE=cpu in the environment" in refused.value.message
    monkeypatch.setenv("TWINKLE_DEVICE", "cpu")
    plan = make_plan(first_yaml(model))
    assert (plan.num_ranks, plan.model.device, plan.bundles) == (1, "cpu", [{"CPU": 1.0}])
    monkeypatch.setenv("TWINKLE_DEVICE", "tpu")
    with pytest.raises(InvalidRequest, match="TWINKLE_DEVICE: 'tpu' .* use 'cpu'"):
        make_plan(first_yaml(model))


def test_sizes_that_leave_gpus_idle_or_take_too_many_are_errors(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 4)
    with pytest.raises(
        InvalidRequest, match=r"data_parallel_size: 3 with 1 ranks .* uses 3; set ray.num_gpus: 3"
    ):
        make_plan(first_yaml(model, data_parallel_size=3))
    with pytest.raises(
        InvalidRequest, match=r"data_parallel_size: 5 copies .* take 5 GPUs, but 4 can be used"
    ):
        make_plan(first_yaml(model, data_parallel_size=5))
    assert make_plan(config(model, data_parallel_size=3)).num_ranks == 3, "nobody asked for all"


def test_ranks_on_a_cpu_are_those_that_are_asked_for(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    assert make_plan(config(model)).num_ranks == 1
    plan = make_plan(config(model, data_parallel_size=2))
    assert (plan.num_ranks, plan.model.device) == (2, "cpu")


def test_what_is_no_safetensors_file_is_named(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    plan = make_plan(config(model))
    assert plan.describe()[-1].endswith("0.0 MB")
    for content in (b"\x08" + b"\0" * 7 + b"[1, 2]  ", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"{]"):
        (Path(model) / "model.safetensors").write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"model\.safetensors: not a safetensors file .* download"):
            plan.describe()


@pytest.mark.usefixtures("megatron")
def test_the_plan_says_what_each_rank_holds(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 4)
    header = b'{"w": {"dtype": "F32", "shape": [1000, 500], "data_offsets": [0, 2000000]}}'
    (Path(model) / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    settings = config(model, use_megatron=True, tensor_parallel_size=2)
    _, _, *rows = make_plan(settings).describe()
    # Half of a million bytes in bfloat16.
    parts = [f"{rank} this machine GPU a part of one of 2 copies 0.5 MB" for rank in range(4)]
    assert [" ".join(row.split()) for row in rows[:-1]] == parts
    apart = settings.model_copy(update={"sampler": SamplerSection(num_gpus=2)})
    _, _, *rows = make_plan(apart).describe()
    assert [" ".join(row.split()) for row in rows] == [
        *(f"{rank} this machine GPU a part of the model 0.5 MB" for rank in (0, 1)),
        *(
            f"sampler {number} this machine GPU the model, transformers sampler of its own 1.0 MB"
            for number in (0, 1)
        ),
    ]
    *_, row = make_plan(config(model, data_parallel_size=1)).describe()
    assert " ".join(row.split()) == "0 this machine GPU the model, transformers sampler 1.0 MB"


def test_a_base_is_spread_over_all_gpus_that_are_asked_for(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 4)
    header = b'{"w": {"dtype": "F32", "shape": [1000, 800], "data_offsets": [0, 3200000]}}'
    (Path(model) / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    plan = make_plan(first_yaml(model, shard_base=True))
    assert (plan.num_ranks, plan.shares_rows, plan.model.shard_base) == (4, True, True)
    assert plan.samplers is None, "no rank has the whole model, and no GPU is left"
    apart = make_plan(
        first_yaml(model, shard_base=True).model_copy(update={"sampler": SamplerSection(num_gpus=1)})
    )
    _, _, *rows = apart.describe()
    assert [" ".join(row.split()) for row in rows] == [
        # A third of 1.6 million bytes in bfloat16; the sampler has the whole.
        *(f"{rank} this machine GPU part {rank + 1} of 3 of the model 0.5 MB" for rank in (0, 1, 2)),
        "sampler 0 this machine GPU the model, transformers sampler of its own 1.6 MB",
    ]
    assert apart.samplers is not None and not apart.samplers.model.shard_base


def test_a_base_that_can_not_be_spread_is_refused(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    cure = r"here is only one; raise model\.data_parallel_size, or leave shard_base out"
    for settings in ({}, {"data_parallel_size": 1}):
        with pytest.raises(InvalidRequest, match=rf"model\.shard_base: .*{cure}"):
            make_plan(config(model, shard_base=True, **settings))
    plan = make_plan(config(model, shard_base=True, data_parallel_size=2))
    assert plan.samplers is not None and (plan.num_ranks, plan.samplers.processes) == (2, 1)
    with pytest.raises(InvalidRequest, match=r"shard_base: Megatron .* leave shard_base out"):
        make_plan(config(model, shard_base=True, use_megatron=True, data_parallel_size=2))
    with_gpus(monkeypatch, 1)
    with pytest.raises(InvalidRequest, match=r"shard_base: .* raise ray\.num_gpus"):
        make_plan(config(model, shard_base=True))


def test_local_mode_takes_one_gpu_of_several(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 4)
    asked: list[ModelConfig] = []

    def load(config: ModelConfig, *_names: str) -> None:
        asked.append(config)
        raise InvalidRequest("there is none really")

    monkeypatch.setattr(local, "build_worker", load)
    with pytest.raises(InvalidRequest, match="none really"):
        ServiceClient(config(model)).create_lora_training_client(model)
    assert [(found.num_ranks, found.device) for found in asked] == [(1, "cuda")]


# ---------------------------------------------------------------- samplers


def sampling(settings: ServerConfig, **section: object) -> ServerConfig:
    return settings.model_copy(update={"sampler": SamplerSection.model_validate(section)})


def test_gpus_of_samplers_are_taken_from_all_and_the_rest_trains(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 8)
    plan = make_plan(sampling(first_yaml(model), num_gpus=3))
    assert plan.num_ranks == 1 and plan.samplers is not None and plan.samplers.processes == 3
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4 and plan.sampler_of(0) is None
    plan = make_plan(sampling(config(model), replicas=2))
    assert (plan.num_ranks, plan.bundles) == (6, [{"CPU": 1.0, "GPU": 1.0}] * 8)
    (Path(model) / "python").touch()
    elsewhere = {"engine": "vllm", "python": f"{model}/python", "tensor_parallel_size": 2}
    plan = make_plan(sampling(config(model), **elsewhere, num_gpus=4))
    assert plan.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 4 + [{"CPU": 1.0, "GPU": 2.0}] * 2
    assert plan.samplers is not None and plan.samplers.model.tensor_parallel_size == 2
    assert make_plan(sampling(config(model), **elsewhere)).bundles[-1] == {"CPU": 1.0, "GPU": 2.0}
    plan = make_plan(sampling(config(model), engine="none"))
    assert (plan.num_ranks, plan.samplers) == (8, None)
    assert plan.describe()[-1] == "It only trains: sampler.engine is none."


def test_samplers_that_come_and_go_have_their_gpus_and_no_bundle(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 8)
    plan = make_plan(sampling(config(model), replicas=1, max_replicas=3, target_sequences=8))
    assert plan.samplers is not None
    assert (plan.samplers.processes, plan.samplers.max_processes, plan.samplers.target_sequences) == (1, 3, 8)
    assert (plan.num_ranks, plan.samplers.all_gpus) == (5, 3)
    one = {"CPU": 1.0, "GPU": 1.0}
    assert (plan.bundles, plan.most_bundles, plan.sampler_bundle) == ([one] * 6, [one] * 8, one)
    rows = [" ".join(line.split()) for line in plan.describe()]
    assert rows[-3:] == [
        "sampler 0 this machine GPU the model, transformers sampler of its own 0.0 MB",
        *(
            f"sampler {number} this machine GPU the model, transformers sampler of its own, while there is load (up "
            "to 3) 0.0 MB"
            for number in (1, 2)
        ),
    ]
    assert make_plan(sampling(config(model), num_gpus=3, max_replicas=3)).bundles == [one] * 6, "auto is one"
    fixed = make_plan(sampling(config(model), replicas=3))
    assert fixed.samplers is not None and fixed.samplers.max_processes == 3
    assert fixed.bundles == fixed.most_bundles
    assert make_plan(config(model)).most_bundles == [one] * 8, "samplers beside training take nothing"
    with_gpus(monkeypatch, 0)
    on_cpu = make_plan(sampling(config(model), replicas=2, max_replicas=4))
    assert (on_cpu.bundles, on_cpu.most_bundles) == ([{"CPU": 1.0}] * 3, [{"CPU": 1.0}] * 5)


@pytest.mark.usefixtures("megatron")
def test_on_a_cpu_a_spread_model_has_a_sampler_of_its_own(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    plan = make_plan(config(model, use_megatron=True, pipeline_parallel_size=2))
    assert plan.samplers is not None and (plan.samplers.processes, plan.samplers.gpus) == (1, 0)
    assert plan.samplers.model.num_ranks == 1 and plan.bundles == [{"CPU": 1.0}] * 3
    # As the mission's files are on four GPUs, so a file with samplers runs on a CPU.
    monkeypatch.setenv("TWINKLE_DEVICE", "cpu")
    plan = make_plan(sampling(first_yaml(model), num_gpus=3))
    assert plan.samplers is not None and plan.bundles == [{"CPU": 1.0}] * 4


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"num_gpus": 4}, "its samplers take 4 GPUs, but 4 can be used here, and training needs some"),
        ({"replicas": 9}, "its samplers take 9 GPUs"),
        ({"num_gpus": 2, "replicas": 3}, r"num_gpus: 2, but sampler.replicas: 3 with 1 GPU each .* take 3"),
        ({"replicas": 1, "max_replicas": 4}, "its samplers take 4 GPUs, but 4 can be used here"),
        (
            {"replicas": 3, "max_replicas": 2},
            "max_replicas: 2, but sampler.replicas: 3 are always there; raise",
        ),
        ({"max_replicas": 2}, "max_replicas: 2, but there would be 0 samplers of their own, .*; set"),
        (
            {"num_gpus": 2, "replicas": 1, "max_replicas": 3},
            r"num_gpus: 2, but sampler.max_replicas: 3 with 1 GPU each .* take 3; leave",
        ),
        (
            {"replicas": 2, "target_sequences": 8},
            "target_sequences: 8 is for a number .*; say with sampler.max_",
        ),
        (
            {"engine": "none", "max_replicas": 2},
            "sampler.engine: none starts no samplers; leave out .*max_replicas",
        ),
        ({"tensor_parallel_size": 2}, "the transformers engine samples on one device"),
        ({"engine": "none", "num_gpus": 1}, "sampler.engine: none starts no samplers"),
        ({"engine": "nonesuch"}, "'nonesuch' is not installed"),
        (
            {"engine": "vllm", "python": "/nowhere/python"},
            r"sampler.python: /nowhere/python is not there; make",
        ),
    ],
)
def test_samplers_that_do_not_fit_are_errors(
    section: dict[str, object], said: str, model: str, monkeypatch: pytest.MonkeyPatch
):
    with_gpus(monkeypatch, 4)
    with pytest.raises(InvalidRequest, match=said):
        make_plan(sampling(first_yaml(model), **section))


def test_gpus_for_samplers_where_there_are_none_or_too_few_for_a_layer(
    model: str, monkeypatch: pytest.MonkeyPatch
):
    (Path(model) / "python").touch()
    with_gpus(monkeypatch, 0)
    with pytest.raises(InvalidRequest, match=r"sampler.num_gpus: 2 of no GPUs"):
        make_plan(sampling(config(model), num_gpus=2))
    with_gpus(monkeypatch, 4)
    odd = {"engine": "vllm", "python": f"{model}/python", "tensor_parallel_size": 2, "num_gpus": 3}
    with pytest.raises(InvalidRequest, match="3 is not a multiple of sampler.tensor_parallel_size: 2"):
        make_plan(sampling(config(model), **odd))
    with pytest.raises(
        InvalidRequest, match=r"data_parallel_size: 3 copies .* 4 can be used here, 2 of them by"
    ):
        make_plan(sampling(first_yaml(model, data_parallel_size=3), num_gpus=2))


def test_gpus_of_a_cluster_are_those_of_all_its_machines(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    joined = config(model).model_copy(update={"ray": RaySection(address="10.0.0.1:6379", num_gpus=16)})
    assert make_plan(joined).num_ranks == 16, "taken for true where the cluster isn't asked"
    with pytest.raises(InvalidRequest, match=r"16 GPUs .* the Ray cluster at 10.0.0.1:6379 has 8;"):
        make_plan(joined, 8)
    assert make_plan(joined, 16).describe()[2].split()[:3] == ["0", "by", "Ray"]
    everything = joined.model_copy(update={"ray": RaySection(address="auto")})
    assert make_plan(everything, 24).num_ranks == 24


@pytest.mark.usefixtures("megatron")
def test_ranks_that_share_layers_are_on_one_machine(model: str, monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 8)
    plan = make_plan(config(model, use_megatron=True, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert plan.bundles == [{"CPU": 2.0, "GPU": 2.0}] * 4
    assert [plan.bundle_of_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
