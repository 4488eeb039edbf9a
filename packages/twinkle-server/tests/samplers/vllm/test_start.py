"""What keeps a vLLM engine from starting is said when it is made."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.backends.protocol import ModelConfig
from twinkle.server.samplers.vllm import VllmEngine

has_vllm = find_spec("vllm") is not None


@pytest.mark.skipif(has_vllm, reason="vllm is installed here")
def test_where_vllm_is_missing_the_command_that_installs_it_is_named(model_dir: Path):
    with pytest.raises(
        InvalidRequest, match=r"sampler.engine: vllm is not installed.*pip install .twinkle-server\[vllm\]"
    ):
        VllmEngine.create(ModelConfig(model_dir), None)


@pytest.mark.skipif(not has_vllm, reason="vllm is not installed here")
def test_a_model_that_loads_and_cannot_be_computed_with_is_refused_and_leaves_nothing(tiny_model_dir: Path):
    """Its heads of 16 numbers are too small for vLLM's attention on a CPU."""
    before = psutil.Process().children(recursive=True)
    with pytest.raises(InvalidRequest, match="can't compute with it on this device"):
        VllmEngine.create(ModelConfig(tiny_model_dir, max_lora_rank=8, max_sampler_adapters=2), None)
    left = set(psutil.Process().children(recursive=True)) - set(before)
    assert not [process for process in left if "resource_tracker" not in " ".join(process.cmdline())]


@pytest.mark.skipif(not has_vllm, reason="vllm is not installed here")
def test_a_rank_beyond_vllms_is_refused(model_dir: Path):
    with pytest.raises(InvalidRequest, match="model.max_lora_rank: 600; vllm takes up to 512"):
        VllmEngine.create(ModelConfig(model_dir, max_lora_rank=600), None)
