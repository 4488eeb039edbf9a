"""Curves as pictures, from a function and from the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from twinkle.protocol.errors import InvalidRequest, NotFound
from twinkle.runs import Run, plot_runs
from twinkle.runs.plot import smoothed


def run_of(root: Path, name: str, **metrics: list[float]) -> Path:
    with Run(name, root=root) as run:
        for values in zip(*metrics.values(), strict=True):
            run.log(**dict(zip(metrics, values, strict=True)))
    return run.directory


def is_drawn(path: Path) -> bool:
    """A picture with something coloured in it."""
    pixels = imread(path)[..., :3]
    return bool((np.ptp(pixels, axis=-1) > 0.2).any())


def test_a_panel_for_each_metric_and_a_line_for_each_run(tmp_path: Path):
    first = run_of(tmp_path, "first", loss=[3.0, 2.0, 1.0], reward=[0.0, 0.5, 1.0])
    second = run_of(tmp_path, "second", loss=[2.0, 1.5, 1.2])
    both = plot_runs([first, second], tmp_path / "both.png", smoothing=0.5)
    one = plot_runs(first, tmp_path / "one.png", metrics=["loss"])
    assert is_drawn(both) and is_drawn(one)
    assert imread(both).shape[1] > 1.8 * imread(one).shape[1]  # two panels beside each other


def test_smoothing_is_an_average_of_what_was():
    assert smoothed([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, (0.5 * 1.0) / (1 - 0.25)])


def test_what_is_wrong_is_said(tmp_path: Path):
    run = run_of(tmp_path, "run", loss=[1.0])
    with pytest.raises(InvalidRequest, match="reward: no run logged that; they have loss"):
        plot_runs(run, tmp_path / "x.png", metrics=["reward"])
    with pytest.raises(InvalidRequest, match="smoothing: 1.0"):
        plot_runs(run, tmp_path / "x.png", smoothing=1.0)
    with pytest.raises(NotFound, match="no such file"):
        plot_runs(tmp_path / "nothing", tmp_path / "x.png")


def test_plotting_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path, "run", loss=[1.0])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'twinkle-core\[plot\]'"):
        plot_runs(run, tmp_path / "x.png")


def twinkle(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twinkle.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_lists_shows_and_plots(tmp_path: Path):
    run = run_of(tmp_path, "run", loss=[3.0, 2.0, 1.25])
    listed = twinkle("runs", "list", tmp_path)
    assert str(run) in listed.stdout and "loss 1.25" in listed.stdout
    assert twinkle("runs", "show", run, "--last", 2).stdout.splitlines() == [
        "step 0  loss 2",
        "step 0  loss 1.25",
    ]
    picture = tmp_path / "curves.png"
    assert twinkle("runs", "plot", run, "-o", picture, "--metrics", "loss").stdout.strip() == str(picture)
    assert is_drawn(picture)


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path: Path):
    for arguments in (["runs", "list", tmp_path], ["runs", "show", tmp_path], ["runs", "plot", tmp_path]):
        done = twinkle(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
    assert "runs" in twinkle("--help").stdout
