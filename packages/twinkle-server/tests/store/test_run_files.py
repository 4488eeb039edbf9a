"""A run's state on disk: what is read is what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disks import Disk
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from twinkle.protocol.errors import ServerFault
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, OptimizerState
from twinkle.server.store import run_files
from twinkle.server.store.files import LocalFiles
from twinkle.server.store.run_files import RunFiles

RUN = "session:train:0"
# Not in the order of the alphabet.
NAMES = tuple(f"base_model.model.experts.down_proj.lora_{matrix}.weight" for matrix in "BA")


def matrices(seed: int) -> dict[str, np.ndarray]:
    """Float32 of every kind: any bits but those of 0 and 1, and one matrix that doesn't lie in order."""
    draw = np.random.default_rng(seed)
    a, b = (draw.integers(0, 2**32, shape, np.uint32).view(np.float32) for shape in ((6, 5), (6, 4)))
    a[0, :4] = [-0.0, np.nan, np.inf, np.finfo(np.float32).smallest_subnormal]
    return {NAMES[0]: a, NAMES[1]: b.T}


STATE = AdapterState(
    AdapterSpec(rank=2, alpha=7.5, seed=2**62 + 1, train_unembed=False),
    ["experts.down_proj"],
    matrices(0),
    OptimizerState(17, matrices(1), matrices(2)),
    matrices(3),
)


def check_same(mine: AdapterState, theirs: AdapterState) -> None:
    assert (mine.spec, mine.target_modules) == (theirs.spec, theirs.target_modules)
    check_same_bits(mine.weights, theirs.weights)
    check_same_bits(mine.gradients, theirs.gradients)
    if mine.optimizer is None or theirs.optimizer is None:
        assert mine.optimizer is theirs.optimizer
        return
    assert mine.optimizer.step == theirs.optimizer.step
    check_same_bits(mine.optimizer.exp_avg, theirs.optimizer.exp_avg)
    check_same_bits(mine.optimizer.exp_avg_sq, theirs.optimizer.exp_avg_sq)


def check_same_bits(mine: dict[str, np.ndarray] | None, theirs: dict[str, np.ndarray] | None) -> None:
    if mine is None or theirs is None:
        assert mine is theirs
        return
    assert list(mine) == list(theirs)
    for name, matrix in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (np.float32, matrix.shape)
        assert mine[name].tobytes() == matrix.tobytes()


@pytest.mark.parametrize(
    "state",
    [STATE, replace(STATE, gradients=None), replace(STATE, optimizer=None)],
    ids=("all", "no gradient", "bare"),
)
def test_a_state_comes_back_to_the_bit(disk: Disk, state: AdapterState):
    files = RunFiles(disk.files)
    files.write(RUN, 3, STATE)
    files.write(RUN, 11, state)
    assert files.numbers(RUN) == [3, 11]
    check_same(files.read(RUN, 3), STATE)
    check_same(files.read(RUN, 11), state)
    files.delete_older(RUN, 11)
    assert files.numbers(RUN) == [11]
    files.delete_run(RUN)
    assert disk.paths() == {} and files.numbers(RUN) == []


def test_a_write_that_fails_leaves_what_was_there(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    files = RunFiles(disk.files)
    files.write(RUN, 1, STATE)

    def full(_arrays: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(run_files.safetensors_numpy, "save_file", full)
    for number in (1, 2):
        with pytest.raises(OSError, match="no space"):
            files.write(RUN, number, replace(STATE, gradients=None))
    assert list(disk.paths()) == [f"{RUN}/1.safetensors"]
    check_same(files.read(RUN, 1), STATE)


@pytest.mark.parametrize("content", [b"not what it was", None])
def test_a_file_that_cannot_be_read_is_a_fault_with_the_run_in_it(disk: Disk, content: bytes | None):
    files = RunFiles(disk.files)
    files.write(RUN, 1, STATE)
    disk.change(f"{RUN}/1.safetensors", content)
    with pytest.raises(ServerFault, match=f"{RUN}.*begin a new run from its last checkpoint"):
        files.read(RUN, 1)


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), size=st.sampled_from([1, 4, 512]))
def test_changed_bytes_are_never_taken_for_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, place: float, flip: int, size: int
):
    directory = tmp_path_factory.mktemp("e")
    files = RunFiles(LocalFiles(directory))
    files.write(RUN, 1, STATE)
    path = directory / RUN / "1.safetensors"
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    for i in range(at, min(at + size, len(content))):
        content[i] ^= flip
    path.write_bytes(content)
    try:
        read = files.read(RUN, 1)
    except ServerFault as error:
        assert RUN in error.message and not files.is_whole(RUN, 1)
    else:  # a byte that says nothing, as blanks behind the header
        check_same(read, STATE)


def test_a_flipped_bit_of_a_weight_is_told_of(tmp_path: Path):
    files = RunFiles(LocalFiles(tmp_path))
    files.write(RUN, 1, STATE)
    path = tmp_path / RUN / "1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ServerFault, match=f"{RUN}.*differs from its checksum.*last checkpoint"):
        files.read(RUN, 1)


def test_a_file_of_an_earlier_version_without_checksum_is_read(tmp_path: Path):
    files = RunFiles(LocalFiles(tmp_path))
    files.write(RUN, 1, STATE)
    path = tmp_path / RUN / "1.safetensors"
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        state = file.metadata()["state"]
    save_file(arrays, path, metadata={"state": state})
    check_same(files.read(RUN, 1), STATE)


def test_of_other_runs_nothing_stays(disk: Disk):
    files = RunFiles(disk.files)
    files.delete_all_but(set())
    for run_id in ("a:train:0", "b:train:0"):
        files.write(run_id, 1, STATE)
    files.delete_all_but({"b:train:0"})
    assert list(disk.paths()) == ["b:train:0/1.safetensors"]
