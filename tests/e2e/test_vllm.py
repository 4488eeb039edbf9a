"""A server that samples with vLLM, in an environment of its own, as a user starts it.

`scripts/hatch run vllm:setup` makes the environment; without it, this is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cookbook_server
import pytest
import running_server
import sdk_suite
from peft_reference import MODEL
from server_processes import processes_of, wait_for

from twinkle.protocol.types import SamplingParams
from twinkle_client import ServiceClient

PYTHON = cookbook_server.REPOSITORY / ".venv-vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.serve,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="scripts/hatch run vllm:setup makes the environment"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cookbook's model under the mission's name, which the SDK's suite takes."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(cookbook_server.DATA / cookbook_server.MODEL, root / MODEL)
    return root


@pytest.fixture(scope="module")
def server(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[running_server.RunningServer]:
    directory, port = tmp_path_factory.mktemp("vllm"), running_server.free_port()
    config = running_server.write_config(
        directory,
        port,
        MODEL,
        model_extra="  max_lora_rank: 16\n  max_context_length: 256\n",
        sampler=f"{{engine: vllm, python: {PYTHON}}}",
    )
    # A core for vLLM's processes, and little memory for keys and values.
    limits = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    server = running_server.start(config, hub, port, more=limits)
    yield server
    server.stop()


def test_it_says_which_engine_samples(server: running_server.RunningServer) -> None:
    assert "1 vllm sampler with processes of their own" in "".join(server.lines)
    assert len(processes_of(server, "ray::SamplerProcess")) == 1


def test_the_mean_reward_of_grpo_rises_and_sampler_and_trainer_agree(
    server: running_server.RunningServer, hub: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(cookbook_server.COOKBOOK / "client/twinkle/self_host/grpo.py")),
            *("--base-url", server.base_url, "--base-model", MODEL, "--question", "What is {a} + {b}?"),
            *("--largest", "3", "--max-tokens", "4", "--steps", "18", "--prompts", "8", "--group-size", "16"),
            *("--learning-rate", "2e-3", "--seed", "0"),
        ],
        cwd=tmp_path,
        env=cookbook_server.environment(TWINKLE_HUB_ROOT=str(hub)),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [metrics] = (tmp_path / "runs").glob("grpo-*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 18
    # Two means of four steps of 128 samples by a chance of one half differ by more than this once in 30,000 times.
    assert sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4 > 4 * 0.5 * 2**0.5 / 512**0.5
    # Log-probabilities of samples are the trainer's: another engine, so not to the last bit.
    assert max(row["kl"] for row in rows if "kl" in row) < 1e-5


def test_the_sdks_suite_of_sampling_passes(server: running_server.RunningServer, hub: Path) -> None:
    sdk_suite.run(server.base_url, hub / MODEL, sdk_suite.UNPATCHED, sdk_suite.SAMPLING, seconds=800)


def test_a_killed_vllm_is_replaced_and_no_client_notices(server: running_server.RunningServer) -> None:
    with ServiceClient(server.base_url, api_key="ada") as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        sampler = client.save_weights_and_get_sampling_client()
        greedy = SamplingParams(max_tokens=16, temperature=0, stop=[])
        expected = sampler.sample([1, 2, 3], 1, greedy).sequences[0].tokens
        [victim] = processes_of(server, "ray::SamplerProcess")
        samples = [sampler.sample([1, 2, 3], 2, greedy) for _ in range(4)]
        os.kill(victim, signal.SIGKILL)
        for sample in samples:
            assert [sequence.tokens for sequence in sample.result().sequences] == [expected] * 2
    wait_for("the log", lambda: "Sampler 0 is back." in "".join(server.lines))
