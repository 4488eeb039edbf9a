"""The cookbook's Tinker scripts, each run as its user would, against the tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COOKBOOK = Path(__file__).parents[2] / "cookbook" / "client" / "tinker"
KEYS = ("API_KEY", "TINKER_API_KEY", "TWINKLE_API_KEY", "MODELSCOPE_API_KEY", "MODELSCOPE_TOKEN")
ADDRESSES = ("TINKER_BASE_URL", "TWINKLE_BASE_URL", "MODELSCOPE_BASE_URL", "MODELSCOPE_BASE_MODEL")
pytestmark = pytest.mark.serve


def run(hub_root: Path, script: str, *arguments: str, **environment: str) -> str:
    """What the script printed. The scripts of self_host find the server at http://localhost:8000 by themselves."""
    inherited = {k: v for k, v in os.environ.items() if k not in KEYS + ADDRESSES}
    done = subprocess.run(
        [sys.executable, str(COOKBOOK / script), *arguments],
        env={**inherited, "TWINKLE_HUB_ROOT": str(hub_root), "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, printed: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, printed)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_lora_trains_and_a_resumed_run_goes_on_where_it_was(live_server, hub_root: Path):
    printed = run(hub_root, "self_host/lora.py", "--steps", "8", "--learning-rate", "0.02")
    before, after, resumed = (
        numbers(rf"{title}, step \d+: loss (\S+)", printed) for title in ("training", "going on", "resumed")
    )
    assert len(before) == len(after) == len(resumed) == 8
    assert before[-1] < 0.6 * before[0]
    assert mean(after) < 0.8 * mean(before)
    assert resumed == pytest.approx(after, abs=2e-3)


def test_self_cognition_trains_and_sample_samples_from_its_checkpoint(live_server, hub_root: Path):
    printed = run(hub_root, "self_host/self_cognition.py", "--epochs", "2", "--learning-rate", "0.02")
    losses = numbers(r"loss (\S+)", printed)
    assert len(losses) == 14  # 50 rows in batches of 8, twice
    assert mean(losses[-3:]) < 0.7 * losses[0]
    assert re.search(
        r"saved \S+/weights/tinker-self-cognition\nWho are you\?\n  before: .*\n  after:  ",
        printed,
        re.DOTALL,
    )

    arguments = ("--max-tokens", "8", "--stop", "a", "--question", "Hi!")
    from_base = run(hub_root, "self_host/sample.py", *arguments)
    from_checkpoint = run(hub_root, "self_host/sample.py", "twinkle://tinker-self-cognition", *arguments)
    for sampled in (from_base, from_checkpoint):
        counts = numbers(r": (\d+) tokens, (?:stop|length), mean logprob -\d", sampled)
        assert len(counts) == 5  # one greedy, three seeded, one with a stop text
        assert all(1 <= count <= 8 for count in counts)
        # Every token of the question but the first has a log-probability.
        assert sampled.count("(first)") == 1
        assert len(numbers(r"' +(-\d+\.\d+)\n", sampled)) > len("Hi!")
    assert from_base != from_checkpoint
    assert run(hub_root, "self_host/sample.py", *arguments) == from_base  # seeded


def test_the_reward_of_short_math_grpo_rises(live_server, hub_root: Path):
    # A model of random weights writes anything but digits at first; a task of nine additions is one it can learn.
    printed = run(
        hub_root,
        "self_host/short_math_grpo.py",
        *("--question", "{a}+{b}=", "--largest", "2", "--max-tokens", "4"),
        *("--steps", "15", "--group-size", "64", "--prompts", "8", "--learning-rate", "0.01"),
    )
    rewards = numbers(r"reward (\S+),", printed)
    assert len(rewards) == 15
    assert mean(rewards[:3]) < 0.15
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.25
    assert re.search(r"right answers: \d+% before, \d+% after", printed)


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_short_math_grpo_takes_the_other_losses(live_server, hub_root: Path, loss: str):
    printed = run(
        hub_root,
        "self_host/short_math_grpo.py",
        *("--loss", loss, "--question", "{a}+{b}=", "--largest", "2", "--max-tokens", "4"),
        *("--steps", "2", "--group-size", "8", "--prompts", "4", "--learning-rate", "0.01"),
    )
    assert len(numbers(r"reward (\S+),", printed)) == 2


def test_the_scripts_for_a_hosted_endpoint_run_against_the_one_that_the_environment_names(
    live_server, hub_root: Path
):
    endpoint = {
        "MODELSCOPE_BASE_URL": live_server.base_url,
        "MODELSCOPE_TOKEN": "a-key-of-any-form",
        "MODELSCOPE_BASE_MODEL": "Qwen/Qwen3.5-4B",
    }
    trained = run(
        hub_root, "modelscope/self_cognition.py", "--epochs", "1", "--learning-rate", "0.02", **endpoint
    )
    losses = numbers(r"loss (\S+)", trained)
    assert len(losses) == 7
    assert losses[-1] < 0.7 * losses[0]
    [path] = re.findall(r"saved (\S+)", trained)

    sampled = run(hub_root, "modelscope/sample.py", path, "--max-tokens", "8", **endpoint)
    assert len(numbers(r"(\d+) tokens, (?:stop|length)", sampled)) == 2


def test_the_scripts_for_a_hosted_endpoint_say_what_is_missing(hub_root: Path):
    with pytest.raises(AssertionError, match="Set MODELSCOPE_BASE_URL and MODELSCOPE_BASE_MODEL"):
        run(hub_root, "modelscope/sample.py")
