"""vLLM in a process that Ray starts with this environment's Python, as a server's sampler is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from sampling_contract import greedy
from vllm_engines import require_vllm

from twinkle.protocol.types import SamplingParams
from twinkle.server.backends.protocol import AdapterState, ModelConfig
from twinkle.server.samplers.protocol import GenerateRequest

require_vllm()
pytestmark = [pytest.mark.serve]


class Sampler:
    def __init__(self, config: ModelConfig) -> None:
        from twinkle.server.samplers.vllm import VllmEngine

        self._engine = VllmEngine.create(config, None)

    def processes(self) -> list[int]:
        return [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]

    def sample(self, state: AdapterState, prompt: list[int], count: int) -> list[int]:
        self._engine.add_adapter("a", state)
        params = SamplingParams(max_tokens=count, temperature=0, stop=[])
        future = self._engine.generate(GenerateRequest("t", "a", np.array(prompt), params))
        return future.result(60).sequences[0].tokens


def test_an_actor_samples_and_leaves_no_process_behind_when_it_is_killed(model_dir: Path, states, references):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        environment = {"py_executable": sys.executable, "env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        actor: Any = ray.remote(Sampler).options(num_cpus=1, runtime_env=environment)
        sampler: Any = actor.remote(ModelConfig(model_dir, max_lora_rank=16, max_sampler_adapters=4))
        tokens = ray.get(sampler.sample.remote(states["large"], [1, 2, 3], 10), timeout=240)
        assert tokens == greedy(references["large"], [1, 2, 3], 10)
        processes = [psutil.Process(pid) for pid in ray.get(sampler.processes.remote())]
        assert len(processes) >= 3
        ray.kill(sampler)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive
    finally:
        ray.shutdown()
