import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.store.checkpoint_files import CheckpointFiles

URI = CheckpointUri("name", "run:train:0", "weights")


def a_state(seed: int = 0, with_optimizer: bool = True) -> AdapterState:
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=3, seed=seed, alpha=6))
    return backend.export_adapter("a", with_optimizer)


def test_what_is_written_is_read(tmp_path: Path):
    files = CheckpointFiles(tmp_path)
    state = a_state()
    size = files.write(URI, state, "org/model")
    assert size == sum(path.stat().st_size for path in files.path(URI).iterdir())
    back = files.read(URI, with_optimizer=True)
    assert (back.spec.rank, back.spec.alpha) == (3, 6)
    for name, matrix in state.weights.items():
        np.testing.assert_array_equal(back.weights[name], matrix)
    assert back.optimizer is not None and back.optimizer.step == 0


def test_a_second_write_takes_the_place_of_the_first(tmp_path: Path):
    files = CheckpointFiles(tmp_path)
    for seed in (1, 2):
        files.write(URI, a_state(seed), "org/model")
    back = files.read(URI, with_optimizer=False)
    for name, matrix in a_state(2).weights.items():
        np.testing.assert_array_equal(back.weights[name], matrix)
    assert [path.name for path in files.path(URI).parent.iterdir()] == ["name"]


def test_who_looks_while_a_checkpoint_is_replaced_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory can't be renamed over another: between two renames there is none of that name."""
    files = CheckpointFiles(tmp_path)
    files.write(URI, a_state(1), "org/model")
    first = files.digest(URI)
    looking: list[Future[str]] = []
    rename = os.rename

    with ThreadPoolExecutor() as pool:

        def rename_and_let_look(source: Path, target: Path) -> None:
            rename(source, target)
            if not files.path(URI).exists():
                looking.append(pool.submit(files.digest, URI))
                wait(looking, timeout=0.2)

        monkeypatch.setattr(os, "rename", rename_and_let_look)
        files.write(URI, a_state(2), "org/model")
        assert [look.result() for look in looking] == [files.digest(URI)] != [first]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"]
)
def test_a_changed_or_missing_file_is_noticed(tmp_path: Path, name: str):
    files = CheckpointFiles(tmp_path)
    files.write(URI, a_state(), "org/model")
    path = files.path(URI) / name
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ServerFault, match=name):
        files.read(URI, with_optimizer=False)
    path.unlink()
    with pytest.raises(ServerFault, match="incomplete"):
        files.read(URI, with_optimizer=False)


def test_an_optimizer_that_was_not_saved_is_said_to_be_missing(tmp_path: Path):
    files = CheckpointFiles(tmp_path)
    files.write(URI, a_state(with_optimizer=False), "org/model")
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        files.read(URI, with_optimizer=True)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from twinkle.server.store import checkpoint_files

    files = CheckpointFiles(tmp_path)

    def full_disk(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "_write_manifest", full_disk)
    with pytest.raises(OSError):
        files.write(URI, a_state(), "org/model")
    assert list(files.path(URI).parent.iterdir()) == []


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", ".."])
def test_a_manifest_offers_nothing_outside_its_checkpoint(tmp_path: Path, name: str):
    files = CheckpointFiles(tmp_path / "checkpoints")
    files.write(URI, a_state(), "org/model")
    (tmp_path / "secret").write_text("secret")
    manifest = files.path(URI) / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries["files"][name] = {"sha256": "0" * 64, "size_bytes": 6}
    manifest.write_text(json.dumps(entries))
    with pytest.raises(ServerFault, match="incomplete"):
        files.sizes(URI)


def test_a_file_that_became_shorter_is_not_offered(tmp_path: Path):
    files = CheckpointFiles(tmp_path)
    files.write(URI, a_state(), "org/model")
    path = files.path(URI) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ServerFault, match=r"adapter_model.safetensors is not as long"):
        files.sizes(URI)
