"""The programs: how each is called, and what has to be true afterwards.

Each function runs one program of the Tinker cookbook as its own documentation says (`python -m tinker_cookbook...`),
checks what it left, and returns in a few words what was checked.
"""

import json
import math
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import processes
import tinker
from processes import ProgramFailed

RECIPES = "tinker_cookbook.recipes"
DATA = Path(__file__).parent / "data"

# One program, from its start to its end.
LIMIT_SECONDS = 180.0
# Log-probabilities of one token under one adapter, by the sampler and by the trainer, in float32: what the cookbook
# reports is half the mean of the squared difference.
SAMPLER_AGREES = 1e-6


@dataclass(frozen=True)
class Bench:
    """Where a program runs.

    Attributes:
        python: of the environment that tinker-cookbook is installed in.
        model: name that the server has for the model, and a directory with its tokenizer below `directory`.
        directory: in which all programs run.
        environment: with the server's address and a key.
    """

    python: str
    model: str
    directory: Path
    environment: Mapping[str, str]

    def log_of(self, run: str) -> Path:
        """What the programs of this run wrote to their terminal."""
        return self.directory / f"{run}.log"

    def results_of(self, run: str) -> Path:
        """The run's log_path."""
        return self.directory / "runs" / run

    def run(self, run: str, program: list[str], **options: object) -> None:
        """Run a program to its end; its log_path and model are set."""
        process = self.start(run, [*program, f"model_name={self.model}"], **options)
        processes.finish(process, LIMIT_SECONDS)

    def start(self, run: str, program: list[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a program with options in the cookbook's manner: NAME=VALUE."""
        arguments = [f"{name}={value}" for name, value in options.items()]
        command = [self.python, *program, *arguments]
        return processes.start(command, self.directory, self.environment, self.log_of(run))


# ---------------------------------------------------------------- reinforcement learning


def math_rl_sync(bench: Bench) -> str:
    steps = _math_rl(bench, "math_rl_sync", loss_fn="importance_sampling", max_steps=3, save_every=2)
    apart = _largest(steps, "optim/kl_sample_train_v2")
    _require(apart < SAMPLER_AGREES, f"sampler and trainer disagree: {apart:.1e}")
    _require(_saved(bench, "math_rl_sync")[-1]["name"] == "final", "no final checkpoint")
    return f"3 steps, sampler = trainer to {apart:.0e}"


def math_rl_async(bench: Bench) -> str:
    steps = _math_rl(
        bench, "math_rl_async", loss_fn="importance_sampling", max_steps_off_policy=1, max_steps=3
    )
    stale = _largest(steps, "async/staleness_max")
    _require(stale >= 1, "no step was off policy")
    return f"3 steps, staleness {stale:.0f}"


def math_rl_minibatch(bench: Bench) -> str:
    _math_rl(
        bench,
        "math_rl_minibatch",
        loss_fn="importance_sampling",
        max_steps=2,
        **{
            "stream_minibatch_config.groups_per_batch": 4,
            "stream_minibatch_config.num_minibatches": 2,
        },
    )
    return "2 steps of 2 minibatches"


def math_rl_ppo(bench: Bench) -> str:
    _math_rl(bench, "math_rl_ppo", loss_fn="ppo", num_substeps=2, max_steps=2)
    return "2 steps of 2 updates"


def math_rl_cispo(bench: Bench) -> str:
    steps = _math_rl(bench, "math_rl_cispo", loss_fn="cispo", compute_post_kl=True, max_steps=2)
    moved = _largest(steps, "kl_pre_post_v2")
    _require(moved > 0, "the sampler has not moved with the trainer")
    return f"2 steps, policy moved by {moved:.0e}"


def _math_rl(bench: Bench, run: str, max_steps: int, **options: object) -> list[dict[str, float]]:
    """The arithmetic environment, which needs no data set."""
    chosen: dict[str, object] = {
        "env": "arithmetic",
        "renderer_name": "role_colon",
        "groups_per_batch": 4,
        "group_size": 8,
        "max_tokens": 8,
        "learning_rate": 1e-3,
        "lora_rank": 8,
        "save_every": 0,
        "max_steps": max_steps,
        "log_path": bench.results_of(run),
        **options,
    }
    bench.run(run, ["-m", f"{RECIPES}.math_rl.train"], **chosen)
    steps = _metrics(bench, run, max_steps)
    _require(_largest(steps, "env/all/by_group/frac_mixed") > 0, "all rollouts of each group earned the same")
    return steps


def guess_number(bench: Bench) -> str:
    bench.run(
        "guess_number",
        ["-m", f"{RECIPES}.multiplayer_rl.guess_number.train"],
        renderer_name="qwen3_5_disable_thinking",
        batch_size=2,
        group_size=2,
        max_tokens=8,
        learning_rate=1e-3,
        eval_every=0,
        save_every=0,
        max_steps=2,
        log_path=bench.results_of("guess_number"),
    )
    steps = _metrics(bench, "guess_number", 2)
    turns = _largest(steps, "env/all/turns_per_episode")
    _require(turns > 1, "no rollout had a second turn")
    return f"2 steps, {turns:.0f} turns an episode"


# ---------------------------------------------------------------- supervised


def chat_sl(bench: Bench) -> str:
    run = "chat_sl"
    _chat_sl(bench, run, max_steps=3)
    steps = _metrics(bench, run, 3)
    loss = [step["train_mean_nll"] for step in steps]
    _require(loss[-1] < loss[0], f"loss does not fall: {loss}")
    names = [str(record["name"]) for record in _saved(bench, run)]
    _require(names == ["000001", "000002", "final"], f"checkpoints were {names}")
    kept = _checkpoints_on_server(bench, run)
    _require(kept == {"weights/final", "sampler_weights/final"}, f"the server keeps {sorted(kept)}")
    return f"loss {loss[0]:.2f} to {loss[-1]:.2f}, rolling checkpoints deleted"


def chat_sl_resume(bench: Bench) -> str:
    """Ended without warning after some steps; the same command again goes on from the rolling checkpoint."""
    run = "chat_sl_resume"
    _chat_sl_until_killed(bench, run, rows=4)
    # An epoch is one batch.
    done = int(str(_saved(bench, run)[-1]["epoch"]))
    loss_before = _rows(bench, run)[0]["train_mean_nll"]
    _chat_sl(bench, run, max_steps=done + 2, behavior_if_log_dir_exists="resume")
    steps = _metrics(bench, run, done + 2)
    loss = steps[done]["train_mean_nll"]
    _require("Resumed training from" in bench.log_of(run).read_text(encoding="utf-8"), "it began anew")
    _require(loss < 0.9 * loss_before, f"loss {loss:.2f} after resuming, {loss_before:.2f} at the start")
    return f"killed; resumed at step {done}, loss {loss_before:.2f} to {loss:.2f}"


def _chat_sl_until_killed(bench: Bench, run: str, rows: int) -> None:
    options = _chat_sl_options(bench, run, max_steps=1000)
    process = bench.start(run, ["-m", f"{RECIPES}.chat_sl.train", f"model_name={bench.model}"], **options)
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(_rows(bench, run)) < rows:
        if process.poll() is not None or time.monotonic() > deadline:
            processes.kill(process)
            raise ProgramFailed(f"{rows} steps were not done (exit code {process.returncode})")
        time.sleep(0.1)
    processes.kill(process)


def _chat_sl(bench: Bench, run: str, max_steps: int, **options: object) -> None:
    chosen = {**_chat_sl_options(bench, run, max_steps), **options}
    bench.run(run, ["-m", f"{RECIPES}.chat_sl.train"], **chosen)


def _chat_sl_options(bench: Bench, run: str, max_steps: int) -> dict[str, object]:
    return {
        "dataset": DATA / "conversations.jsonl",
        "renderer_name": "role_colon",
        "batch_size": 8,
        "num_epochs": 1000,
        "max_steps": max_steps,
        "learning_rate": 1e-2,
        "lr_schedule": "constant",
        "lora_rank": 8,
        "save_every": 0,
        "rolling_save_every": 1,
        "log_path": bench.results_of(run),
    }


def prompt_distillation(bench: Bench) -> str:
    """The recipe's own data set, made by the model, then trained on."""
    run = "prompt_distillation"
    made = bench.directory / "prompt_distillation.jsonl"
    made.unlink(missing_ok=True)
    # It names its model itself, and reads the sentences from the directory that it runs in.
    process = bench.start(run, ["-m", f"{RECIPES}.prompt_distillation.create_data"], output_file=made)
    processes.finish(process, LIMIT_SECONDS)
    answers = [
        json.loads(line)["messages"][1]["content"] for line in made.read_text(encoding="utf-8").splitlines()
    ]
    _require(len(answers) >= 4 and set(answers) == {"en"}, f"the model answered {answers}")
    bench.run(
        run,
        ["-m", f"{RECIPES}.prompt_distillation.train"],
        file_path=made,
        renderer_name="role_colon",
        batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        lora_rank=8,
        log_path=bench.results_of(run),
    )
    _metrics(bench, run, 2)
    return f"{len(answers)} answers, 2 steps on them"


def dpo(bench: Bench) -> str:
    bench.run(
        "dpo",
        [str(Path(__file__).parent / "dpo.py")],
        comparisons=DATA / "comparisons.jsonl",
        renderer_name="role_colon",
        batch_size=8,
        num_epochs=3,
        max_steps=3,
        learning_rate=1e-3,
        lora_rank=8,
        log_path=bench.results_of("dpo"),
    )
    loss = [step["dpo_loss"] for step in _metrics(bench, "dpo", 3)]
    # Policy and reference are equal at the start: the difference of their log-probabilities is none at all.
    _require(abs(loss[0] - math.log(2)) < 1e-4, f"loss begins at {loss[0]}, not at log 2")
    _require(loss[-1] < loss[0], f"loss does not fall: {loss}")
    return f"loss log 2 to {loss[-1]:.3f}"


# ---------------------------------------------------------------- what a program leaves


def _metrics(bench: Bench, run: str, steps: int) -> list[dict[str, float]]:
    """The rows of metrics.jsonl: one of each step, and all numbers finite."""
    written = _rows(bench, run)
    broken = sorted({name for row in written for name, value in row.items() if not math.isfinite(value)})
    # A last row that reports no progress sums up the tokens of a whole reinforcement learning run.
    rows = [row for row in written if any(name.startswith("progress") for name in row)]
    done = [row["step"] for row in rows]
    _require(done == list(range(steps)), f"steps in metrics.jsonl: {done}, expected {steps}")
    _require(not broken, f"not finite: {', '.join(broken)}")
    return rows


def _rows(bench: Bench, run: str) -> list[dict[str, float]]:
    """The numbers in metrics.jsonl as far as it is written."""
    path = bench.results_of(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if isinstance(value, (int, float))} for row in rows]


def _saved(bench: Bench, run: str) -> list[dict[str, object]]:
    lines = (bench.results_of(run) / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _checkpoints_on_server(bench: Bench, run: str) -> set[str]:
    path = str(_saved(bench, run)[-1]["state_path"])
    training_run = path.removeprefix("tinker://").split("/")[0]
    client = tinker.RestClient(
        base_url=bench.environment["TINKER_BASE_URL"], api_key=bench.environment["TINKER_API_KEY"]
    )
    listed = client.list_checkpoints(training_run).result()
    return {checkpoint.checkpoint_id for checkpoint in listed.checkpoints}


def _largest(steps: list[dict[str, float]], name: str) -> float:
    values = [step[name] for step in steps if name in step]
    _require(bool(values), f"no step reports {name}")
    return max(values)


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise ProgramFailed(otherwise)


PROGRAMS: Mapping[str, Callable[[Bench], str]] = {
    program.__name__: program
    for program in (
        math_rl_sync,
        math_rl_async,
        math_rl_minibatch,
        math_rl_ppo,
        math_rl_cispo,
        guess_number,
        chat_sl,
        chat_sl_resume,
        prompt_distillation,
        dpo,
    )
}
