"""The cookbook's scripts for the native client, each run as its user would, against the tiny model that is with it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cookbook_server
import pytest
import running_server
from cookbook_server import MODEL, environment

SCRIPTS = cookbook_server.COOKBOOK / "client" / "twinkle"
pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

# Two outcomes of a chance of one half over n samples differ by more than this times sqrt(1 / n) in one case of 30,000.
FOUR_SIGMA = 4 * 0.5 * 2**0.5


class Program:
    """A script of the cookbook in a folder of its own, where its runs are kept."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self.folder = folder
        self._to_server = ("--base-url", base_url, "--base-model", MODEL)

    def command(self, script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(SCRIPTS / script), *arguments, *self._to_server]

    def run(self, script: str, *arguments: str) -> str:
        """What it printed."""
        return run(self.command(script, *arguments), self.folder)

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """The same without waiting, for several at once."""
        return subprocess.Popen(
            self.command(script, *arguments),
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )

    def metrics(self, name: str) -> list[dict[str, float]]:
        """What its newest run logged, step by step."""
        newest = max((self.folder / "runs").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
        rows: dict[int, dict[str, float]] = {}
        for line in (newest / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
        return list(rows.values())

    def curve(self, name: str, metric: str) -> list[float]:
        return [row[metric] for row in self.metrics(name) if metric in row]


def run(command: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, encoding="utf-8", timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def program(tiny_server: running_server.RunningServer, tmp_path: Path) -> Program:
    return Program(tmp_path, tiny_server.base_url)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


TEACHER = ("--epochs", "5", "--learning-rate", "2e-3", "--save-as", "teacher")


@pytest.fixture(scope="session")
def taught(
    tiny_server: running_server.RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Program]:
    """What self_cognition.py printed, and the folder it ran in; its checkpoint is also the teacher of distillation."""
    program = Program(tmp_path_factory.mktemp("teacher"), tiny_server.base_url)
    return program.run("self_host/self_cognition.py", *TEACHER), program


def test_self_cognition_trains_and_sample_asks_its_checkpoint(taught: tuple[str, Program]):
    printed, program = taught
    losses = program.curve("self-cognition", "loss")
    assert len(losses) == 35
    # Guessing at random among the 832 tokens costs 6.7 nats; half of that is out of reach without learning.
    assert mean(losses[-5:]) < 0.5 * mean(losses[:2])
    [before] = re.findall(r"before: (.*)", printed)
    [after] = re.findall(r"after: (.*)", printed)
    assert "Tiny" in before and "My" not in before
    assert "My" in after and "Tiny" not in after

    base = program.run("self_host/sample.py", "--max-tokens", "16")
    trained = program.run("self_host/sample.py", "twinkle://teacher", "--max-tokens", "16")
    for sampled in (base, trained):
        counts = [
            int(count) for count in re.findall(r"(\d+) tokens, (?:stop|length), mean logprob -\d", sampled)
        ]
        assert len(counts) == 4 and all(1 <= count <= 16 for count in counts)
    assert "Tiny" in base and "Tiny" not in trained
    assert program.run("self_host/sample.py", "--max-tokens", "16") == base  # seeded


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    printed, _ = process.communicate(timeout=500)
    assert process.returncode == 0, printed
    return printed


def test_the_reward_of_grpo_rises_with_three_seeds(tiny_server: running_server.RunningServer, tmp_path: Path):
    """Three programs at once, on one server: each is a tenant's run of its own."""
    programs = [Program(tmp_path / seed, tiny_server.base_url) for seed in ("0", "1", "2")]
    arguments = (
        *("--question", "What is {a} + {b}?", "--largest", "3", "--max-tokens", "4"),
        *("--steps", "18", "--prompts", "8", "--group-size", "16", "--learning-rate", "2e-3"),
    )
    processes: list[subprocess.Popen[str]] = []
    for program in programs:
        program.folder.mkdir()
        processes.append(program.start("self_host/grpo.py", *arguments, "--seed", program.folder.name))
    for process in processes:
        assert re.search(r"right answers: \d+% before, \d+% after", finish(process))
    samples = 4 * 8 * 16
    for program in programs:
        rewards = program.curve("grpo", "reward")
        assert len(rewards) == 18
        assert mean(rewards[-4:]) - mean(rewards[:4]) > FOUR_SIGMA / samples**0.5
        # Sampler and trainer have the same weights: the divergence of the two is rounding.
        assert max(program.curve("grpo", "kl")) < 1e-6


def test_the_reward_of_a_tool_using_model_rises(program: Program):
    printed = program.run(
        "self_host/multi_turn.py",
        *("--smallest", "10", "--largest", "19", "--max-tokens", "32", "--learning-rate", "1.5e-3"),
        *("--steps", "9", "--prompts", "8", "--group-size", "12"),
    )
    rewards = program.curve("multi-turn", "reward")
    assert mean(rewards[-3:]) - mean(rewards[:3]) > 0.05
    assert re.search(r"^tool: \d+$", printed, re.MULTILINE)
    assert "'name': 'add'" in printed


def test_the_margin_of_preferences_grows(program: Program):
    arguments = ("--epochs", "1", "--learning-rate", "5e-4", "--max-tokens", "24")
    processes = [
        program.start("self_host/dpo.py", "--loss", loss, *arguments) for loss in ("dpo", "simpo", "orpo")
    ]
    for process in processes:
        finish(process)
    for loss in ("dpo", "simpo", "orpo"):
        margins, losses = program.curve(loss, "margin"), program.curve(loss, "loss")
        assert len(margins) == 5
        assert margins[-1] > margins[0] + 0.5
        assert losses[-1] < losses[0]
    assert program.curve("dpo", "margin")[0] == pytest.approx(0.0, abs=1e-3)  # a new adapter is the reference
    assert program.curve("dpo", "accuracy")[-1] == 1.0


def test_distillation_takes_the_divergence_from_the_teacher_down(
    program: Program, taught: tuple[str, Program]
):
    processes = [
        program.start(f"self_host/{script}.py", "twinkle://teacher", *arguments)
        for script, *arguments in (
            ("distill_on_policy", "--epochs", "4", "--learning-rate", "4e-3", "--max-tokens", "24"),
            ("distill_off_policy", "--epochs", "3", "--learning-rate", "2e-3"),
        )
    ]
    for process in processes:
        finish(process)
    on_policy = program.curve("distill-on-policy", "kl")
    assert mean(on_policy[-3:]) < 0.8 * mean(on_policy[:3])
    off_policy = program.curve("distill-off-policy", "kl")
    assert min(off_policy) > 0
    assert mean(off_policy[-3:]) < 0.5 * mean(off_policy[:3])


def test_an_interrupted_run_goes_on_with_the_exact_batch(program: Program):
    """Ctrl-C in the middle of a real training, then what it said; and the same without an interruption."""
    script = ("self_host/self_cognition.py", "--epochs", "2", "--learning-rate", "1e-3")
    program.run(*script)
    undisturbed = program.curve("self-cognition", "loss")
    shutil.rmtree(program.folder / "runs")

    process = subprocess.Popen(
        program.command(*script), cwd=program.folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(program.folder.glob("runs/*/metrics.jsonl")) or len(program.metrics("self-cognition")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    [command] = re.findall(r"To go on: (.*)", said)
    interrupted = len(program.metrics("self-cognition"))
    assert 3 <= interrupted < len(undisturbed)

    run(command.split(), program.folder)
    resumed = program.curve("self-cognition", "loss")
    assert resumed == pytest.approx(undisturbed, rel=1e-3)


def test_a_program_learns_the_same_from_the_megatron_server(
    tiny_server: running_server.RunningServer, tmp_path: Path
):
    """Two ranks share each layer; the program is told no more than the address."""
    (tmp_path / "server").mkdir()
    megatron_server = cookbook_server.start("megatron", tmp_path / "server")
    try:
        assert any("megatron backend" in line for line in megatron_server.lines)
        programs = [
            Program(tmp_path / f"client-{i}", server.base_url)
            for i, server in enumerate((megatron_server, tiny_server))
        ]
        script = ("self_host/self_cognition.py", "--epochs", "1", "--learning-rate", "2e-3")
        processes: list[subprocess.Popen[str]] = []
        for program in programs:
            program.folder.mkdir()
            processes.append(program.start(*script))
        printed = [finish(process) for process in processes]
    finally:
        code = megatron_server.stop()
    assert code == 0
    for text in printed:
        assert "saved twinkle://" in text
    spread, whole = (program.curve("self-cognition", "loss") for program in programs)
    assert len(spread) == 7 and mean(spread[-3:]) < 0.8 * spread[0]
    assert spread == pytest.approx(whole, rel=1e-3)
    assert "Traceback" not in "".join(megatron_server.lines)


def test_the_script_for_a_hosted_endpoint_runs_against_the_one_that_the_environment_names(
    program: Program, tiny_server: running_server.RunningServer
):
    script = [sys.executable, str(SCRIPTS / "modelscope" / "self_cognition.py")]
    endpoint = {
        "MODELSCOPE_BASE_URL": tiny_server.base_url,
        "MODELSCOPE_TOKEN": "a-key-of-any-form",
        "MODELSCOPE_BASE_MODEL": MODEL,
    }
    printed = run([*script, "--epochs", "1", "--learning-rate", "2e-3"], program.folder, **endpoint)
    losses = program.curve("self-cognition", "loss")
    assert len(losses) == 7 and losses[-1] < losses[0]
    assert re.search(r"saved twinkle://.*/weights/my-lora-checkpoint", printed)
    with pytest.raises(AssertionError, match="Set MODELSCOPE_BASE_URL and MODELSCOPE_BASE_MODEL"):
        run(script, program.folder)
