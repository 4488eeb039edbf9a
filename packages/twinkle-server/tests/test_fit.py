"""What can't fit is said before anything is loaded, with the reckoning."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twinkle.protocol.errors import InvalidRequest
from twinkle.server import plan as planning
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.config import parse_config
from twinkle.server.fit import check_fits, memory_of_machine
from twinkle.server.plan import make_plan
from twinkle.server.sampler_plan import SamplerPlan

GB = 10**9
MODEL = ModelConfig(Path("m"), torch_dtype="bfloat16")
SPREAD = ModelConfig(
    Path("m"), torch_dtype="bfloat16", tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=2
)


def sampler(gpus: int, processes: int = 1) -> SamplerPlan:
    return SamplerPlan("vllm", processes, MODEL, gpus, None, processes, 32)


def test_72b_at_tp4_pp2_needs_an_eighth_on_each_gpu():
    """145 GB / 8 = 18.1 GB, however many copies there are."""
    check_fits(SPREAD, None, 145 * GB, 19 * GB, has_gpus=True)
    words = r"145\.0 GB in bfloat16, 1/8 on each of 16 ranks: 18\.1 GB; but a GPU here has 18\.0 GB.*tensor_parallel"
    with pytest.raises(InvalidRequest, match=words):
        check_fits(SPREAD, None, 145 * GB, 18 * GB, has_gpus=True)


def test_a_sampler_needs_the_whole_model():
    check_fits(SPREAD, sampler(gpus=2), 145 * GB, 80 * GB, has_gpus=True)
    with pytest.raises(
        InvalidRequest, match=r"the whole model, 145\.0 GB .* on 1 of the GPUs, but each has 80\.0 GB"
    ):
        check_fits(SPREAD, sampler(gpus=1), 145 * GB, 80 * GB, has_gpus=True)


def test_a_sharded_base_takes_its_part_and_a_copy_takes_all():
    copies = ModelConfig(Path("m"), torch_dtype="bfloat16", data_parallel_size=4)
    sharded = ModelConfig(Path("m"), torch_dtype="bfloat16", data_parallel_size=4, shard_base=True)
    check_fits(sharded, None, 60 * GB, 16 * GB, has_gpus=True)
    with pytest.raises(
        InvalidRequest, match=r"all on each rank: 60\.0 GB; but a GPU here has 16\.0 GB.*shard_base"
    ):
        check_fits(copies, None, 60 * GB, 16 * GB, has_gpus=True)


def test_on_a_cpu_all_ranks_and_samplers_share_the_machines_memory():
    check_fits(SPREAD, sampler(0), 10 * GB, 30 * GB, has_gpus=False)
    with pytest.raises(
        InvalidRequest, match=r"in each of 1 samplers, together 30\.0 GB; but this machine has 29\.0"
    ):
        check_fits(SPREAD, sampler(0), 10 * GB, 29 * GB, has_gpus=False)
    check_fits(SPREAD, sampler(0), 10 * GB, None, has_gpus=False)


def test_a_plan_is_refused_by_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    config = parse_config({"model": {"model_id": str(tmp_path), "torch_dtype": "float32"}})
    memory = memory_of_machine()
    assert memory is not None and memory > GB
    make_plan(config)
    monkeypatch.setattr(planning, "memory_of_machine", lambda: 3_900_000)
    with pytest.raises(InvalidRequest, match=r"together 0\.0 GB; but this machine has 0\.0 GB"):
        make_plan(config)
    monkeypatch.setattr(planning, "_found_gpus", lambda: 2)
    monkeypatch.setattr(planning, "memory_of_gpu", lambda: 3_900_000)
    with pytest.raises(InvalidRequest, match="but a GPU here has"):
        make_plan(config)
