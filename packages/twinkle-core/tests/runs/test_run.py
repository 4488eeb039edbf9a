"""The loop of a run, what it writes, and how it goes on after an interruption."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twinkle.dataloader import DataLoader
from twinkle.protocol.errors import InvalidRequest, NotFound, RequestFailed
from twinkle.runs import Run, read_metrics
from twinkle.runs.programs import takes_option
from twinkle.runs.records import read_state
from twinkle.verbs.futures import Pending


@dataclass
class Saver:
    """Stands where a training client is: keeps what was trained when it was saved."""

    trained: list[int] = field(default_factory=list)
    saved: dict[str, list[int]] = field(default_factory=dict)

    def save_state(self, name: str, ttl_seconds: int | None = None, overwrite: bool = False) -> Any:
        self.saved[name] = list(self.trained)
        return SimpleNamespace(result=lambda: SimpleNamespace(path=f"twinkle://run/weights/{name}"))

    def load(self, path: str) -> None:
        self.trained = list(self.saved[path.rpartition("/")[2]])


def loader(seed: int = 3) -> DataLoader[int]:
    return DataLoader(list(range(10)), batch_size=3, seed=seed)


def all_batches(epochs: int) -> list[int]:
    whole = loader()
    return [item for _ in range(epochs) for batch in whole for item in batch]


def train(run: Run, saver: Saver, data: DataLoader[int], stop_in: int | None = None, **options: Any) -> None:
    """Trains on every item; breaks down, like a killed program, in the middle of a step."""
    for step, batch in run.steps(data, saver, **options):
        if step == stop_in:
            raise RuntimeError("the machine went away")
        saver.trained.extend(batch)
        run.log(loss=float(step))


def test_a_run_goes_through_all_epochs_and_logs_each_step(tmp_path: Path):
    saver = Saver()
    with Run("plain", root=tmp_path, config={"learning_rate": 0.1, "path": tmp_path}) as run:
        train(run, saver, loader(), epochs=2)
        run.log(accuracy=0.5)
    assert saver.trained == all_batches(2)
    rows = read_metrics(run.directory)
    assert [(row["step"], row.get("loss")) for row in rows[:-1]] == [(n + 1, float(n)) for n in range(8)]
    assert (rows[-1]["step"], rows[-1]["accuracy"]) == (8, 0.5)
    assert json.loads((run.directory / "config.json").read_text()) == {
        "learning_rate": 0.1,
        "path": str(tmp_path),
    }


def test_two_runs_of_one_name_have_folders_of_their_own(tmp_path: Path):
    first, second = Run("same", root=tmp_path), Run("same", root=tmp_path)
    assert first.directory != second.directory
    first.close()
    second.close()


@pytest.mark.parametrize("stop_in", [2, 3, 5, 6, 7])
def test_a_run_that_broke_down_goes_on_from_its_last_save_with_the_exact_batch(tmp_path: Path, stop_in: int):
    saver = Saver()
    run = Run("broken", root=tmp_path)
    with pytest.raises(RuntimeError), run:
        train(run, saver, loader(), stop_in=stop_in, epochs=2, save_every=2)

    resumed = Run("broken", resume=run.directory)
    assert resumed.state is not None
    assert resumed.step == resumed.state.step == (stop_in // 2) * 2
    saver.load(resumed.state.checkpoint)
    with resumed:
        train(resumed, saver, loader(), epochs=2, save_every=2)
    assert saver.trained == all_batches(2)
    assert [row["step"] for row in read_metrics(run.directory)] == list(range(1, 9))
    assert not (run.directory / "state.json").exists()


def test_two_checkpoints_a_run_are_kept_in_turn(tmp_path: Path):
    saver = Saver()
    with Run("saves", root=tmp_path) as run:
        train(run, saver, loader(), max_steps=5, save_every=1)
        assert read_state(run.directory).checkpoint.endswith("-a")
    assert len(saver.saved) == 2
    assert sorted(len(items) for items in saver.saved.values()) == [10, 13]  # steps of 3, 3, 3, 1, 3 items


def test_steps_end_at_the_smaller_limit(tmp_path: Path):
    saver = Saver()
    with Run("limit", root=tmp_path) as run:
        train(run, saver, loader(), epochs=2, max_steps=3)
    assert saver.trained == all_batches(1)[:9]


def test_ctrl_c_lets_the_step_end_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saver = Saver()
    run = Run("interrupted", root=tmp_path)
    with pytest.raises(SystemExit) as ended, run:
        for step, batch in run.steps(loader(), saver, epochs=2):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            saver.trained.extend(batch)  # happens all the same
    assert ended.value.code == 130
    assert read_state(run.directory).step == 3
    said = capsys.readouterr().err
    assert "Interrupted after step 3" in said
    assert f"--resume {run.directory}" in said

    resumed = Run("interrupted", resume=run.directory)
    with resumed:
        train(resumed, saver, loader(), epochs=2)
    assert saver.trained == all_batches(2)


def test_a_loop_does_not_run_far_ahead_of_what_it_logs(tmp_path: Path):
    """Numbers come when their step is done; the loop waits for those of the step before the last two."""
    futures: list[Future[float]] = []
    done_when_begun: list[int] = []

    def finish_oldest() -> None:
        next(future for future in futures if not future.done()).set_result(1.0)

    with Run("ahead", root=tmp_path) as run:
        for step, _ in run.steps(loader(), Saver(), max_steps=6):
            done_when_begun.append(sum(future.done() for future in futures))
            futures.append(Future())
            run.log(loss=Pending(futures[-1], "loss"))
            if step >= 2:
                threading.Timer(0.05, finish_oldest).start()
            if step == 5:
                for delay in (0.1, 0.15):
                    threading.Timer(delay, finish_oldest).start()
    assert done_when_begun == [0, 0, 0, 1, 2, 3]
    assert len(read_metrics(run.directory)) == 6


def test_ctrl_c_after_the_last_step_saves_too(tmp_path: Path):
    saver = Saver()
    run = Run("late", root=tmp_path)
    last: Future[float] = Future()
    with pytest.raises(SystemExit), run:
        for step, batch in run.steps(loader(), saver, epochs=1):
            saver.trained.extend(batch)
            if step == 3:  # the last one: its loss is waited for when Ctrl-C comes
                run.log(loss=Pending(last, "loss"))
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                threading.Timer(0.4, last.set_result, (1.0,)).start()
    assert read_state(run.directory).step == 4
    resumed = Run("late", resume=run.directory)
    with resumed:
        assert list(resumed.steps(loader(), saver, epochs=1)) == []
    assert saver.trained == all_batches(1)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)  # a shell starts what runs in the background with Ctrl-C ignored
    run = Run("impatient", root=tmp_path)
    with pytest.raises(KeyboardInterrupt), run:
        for _ in run.steps(loader(), Saver(), epochs=1):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_to_go_on_is_the_one_of_the_program_without_an_older_resume(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from types import SimpleNamespace
            from twinkle.dataloader import DataLoader
            from twinkle.runs import Run

            class Saver:
                def save_state(self, name, ttl_seconds=None, overwrite=False):
                    return SimpleNamespace(result=lambda: SimpleNamespace(path="twinkle://run/weights/x"))

            resume = sys.argv[sys.argv.index("--resume") + 1] if "--resume" in sys.argv else None
            with Run("program", resume=resume) as run:
                for step, batch in run.steps(DataLoader(list(range(9)), batch_size=1), Saver(), epochs=1):
                    print("step", step, batch[0])
                    if step in (3, 5):
                        os.kill(os.getpid(), signal.SIGINT)
            """
        )
    )
    command = [sys.executable, str(program), "--rank", "8"]
    items: list[str] = []
    for _ in range(3):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        items += [line.split()[2] for line in done.stdout.splitlines()]
        if done.returncode == 0:
            break
        assert done.returncode == 130, done.stderr
        assert "Traceback" not in done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("To go on: ")]
        command = line.removeprefix("To go on: ").split()
        assert command.count("--resume") == 1
        assert command[2:4] == ["--rank", "8"]
    assert items == [str(item[0]) for item in DataLoader(list(range(9)), batch_size=1)]


def test_a_program_without_arguments_is_told_what_to_write(tmp_path: Path):
    program = tmp_path / "program.py"
    text = textwrap.dedent(
        """
        import os, signal
        from types import SimpleNamespace
        from twinkle.dataloader import DataLoader
        from twinkle.runs import Run

        class Saver:
            def save_state(self, name, ttl_seconds=None, overwrite=False):
                return SimpleNamespace(result=lambda: SimpleNamespace(path="twinkle://run/weights/x"))

        with Run("program") as run:
            for step, batch in run.steps(DataLoader(list(range(5)), batch_size=1), Saver(), epochs=1):
                print("step", step, batch[0])
                if step == 2:
                    os.kill(os.getpid(), signal.SIGINT)
        """
    )
    program.write_text(text)
    first = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 130 and "--resume" not in first.stderr, first.stderr
    [told] = [line for line in first.stderr.splitlines() if "To go on" in line]
    program.write_text(text.replace('Run("program")', told[told.index("Run(") :]))
    second = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert (second.returncode, second.stderr.count("Interrupted")) == (0, 0), second.stderr
    items = [line.split()[2] for line in (first.stdout + second.stdout).splitlines()]
    assert items == [str(item[0]) for item in DataLoader(list(range(5)), batch_size=1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import argparse\nparser.add_argument('--resume')", True),
        ("import typer\ndef main(resume: str | None = None): ...", True),
        ("import argparse\nparser.add_argument('--rank')", False),
        ("Run('a', resume=None)", False),
        ("from mine import main\nmain()", False),
    ],
)
def test_a_script_shows_whether_it_takes_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
):
    script = tmp_path / "script.py"
    script.write_text(text)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script), __spec__=None))  # type: ignore
    assert takes_option("--resume") is expected


def test_a_run_in_another_thread_takes_no_signals(tmp_path: Path):
    saver = Saver()
    with Run("thread", root=tmp_path) as run:
        thread = threading.Thread(target=train, args=(run, saver, loader()), kwargs={"epochs": 1})
        thread.start()
        thread.join()
    assert saver.trained == all_batches(1)


def test_what_is_pending_is_written_in_order_when_it_is_there(tmp_path: Path):
    futures: list[Future[float]] = [Future() for _ in range(3)]
    with Run("pending", root=tmp_path) as run:
        for future in futures:
            run.log(loss=Pending(future, "loss"))
        futures[1].set_result(2.0)
        run.log(loss=4.0)
        assert read_metrics(run.directory) == []  # the first is not there yet
        futures[0].set_result(1.0)
        run.log(loss=5.0)
        assert [row["loss"] for row in read_metrics(run.directory)] == [1.0, 2.0]
        futures[2].set_result(3.0)
    assert [row["loss"] for row in read_metrics(run.directory)] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_pending_number_that_failed_is_raised(tmp_path: Path):
    failed: Future[float] = Future()
    failed.set_exception(RequestFailed("the server is out of memory"))
    with Run("failed", root=tmp_path) as run, pytest.raises(RequestFailed, match="out of memory"):
        run.log(loss=Pending(failed, "loss"))


def test_a_loop_that_is_left_has_come_to_its_end(tmp_path: Path):
    with Run("early", root=tmp_path) as run:
        for step, _ in run.steps(loader(), Saver(), epochs=2, save_every=1):
            if step == 2:
                break
    assert not (run.directory / "state.json").exists()
    with pytest.raises(NotFound, match="it is finished"):
        Run("early", resume=run.directory)


def test_other_hyperparameters_are_told_when_a_run_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Run("config", root=tmp_path, config={"rank": 4, "path": tmp_path, "resume": None})
    with pytest.raises(RuntimeError), run:
        train(run, Saver(), loader(), stop_in=2, epochs=1, save_every=1)
    capsys.readouterr()
    Run("config", resume=run.directory, config={"rank": 8, "path": tmp_path, "resume": "x"}).close()
    assert capsys.readouterr().err == "resumed with another rank: 4 before, 8 now\n"


def test_a_number_that_json_has_no_word_for_is_null(tmp_path: Path):
    with Run("nan", root=tmp_path) as run:
        run.log(loss=float("nan"), reward=1.0)
    assert json.loads((run.directory / "metrics.jsonl").read_text())["loss"] is None


def test_what_is_no_dataloader_is_refused(tmp_path: Path):
    with (
        Run("loader", root=tmp_path) as run,
        pytest.raises(InvalidRequest, match="list is no DataLoader, whose place"),
    ):
        next(run.steps([[1], [2]], Saver(), epochs=1))  # pyright: ignore[reportArgumentType]


def test_what_is_wrong_is_said(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="'a/b' can't name a folder"):
        Run("a/b", root=tmp_path)
    with pytest.raises(NotFound, match="nothing to resume from .there is no run."):
        Run("a", resume=tmp_path / "nothing")
    with Run("finished", root=tmp_path) as run:
        train(run, Saver(), loader(), epochs=1)
        with pytest.raises(InvalidRequest, match="metrics are numbers"):
            run.log(loss="low")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotFound, match="it is finished, or was never saved"):
        Run("finished", resume=run.directory)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="root: can't make"):
        Run("a", root=tmp_path / "file")


def test_a_loop_without_an_end_and_a_used_up_dataloader_are_refused(tmp_path: Path):
    used = loader()
    for _ in used:
        pass
    with Run("limits", root=tmp_path) as run:
        with pytest.raises(InvalidRequest, match="say where the run ends"):
            next(run.steps(loader(), Saver()))
        with pytest.raises(InvalidRequest, match="in epoch 1 already"):
            next(run.steps(used, Saver(), epochs=1))


def test_a_dataloader_that_is_not_as_it_was_is_refused(tmp_path: Path):
    run = Run("other-order", root=tmp_path)
    with pytest.raises(RuntimeError), run:
        train(run, Saver(), loader(), stop_in=2, epochs=1, save_every=1)
    resumed = Run("other-order", resume=run.directory)
    with resumed, pytest.raises(InvalidRequest, match="seed=3, and this loader has seed=4"):
        next(resumed.steps(loader(seed=4), Saver(), epochs=1))
