import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from disks import Disk

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.protocol.uris import CheckpointUri
from twinkle.server.backends.fake import FakeBackend
from twinkle.server.backends.protocol import AdapterSpec, AdapterState, ModelConfig
from twinkle.server.store.checkpoint_files import CheckpointFiles
from twinkle.server.store.files import LocalFiles

URI = CheckpointUri("name", "run:train:0", "weights")
OTHER = CheckpointUri("other", "run:train:1", "weights")
PLACE = "run:train:0/weights/name"
WEIGHTS = f"{PLACE}/adapter_model.safetensors"


def a_state(seed: int = 0, with_optimizer: bool = True) -> AdapterState:
    backend = FakeBackend(ModelConfig(Path("fake")))
    backend.add_adapter("a", AdapterSpec(rank=3, seed=seed, alpha=6))
    return backend.export_adapter("a", with_optimizer)


def check_is(files: CheckpointFiles, uri: CheckpointUri, seed: int) -> None:
    back = files.read(uri, with_optimizer=False)
    for name, matrix in a_state(seed).weights.items():
        np.testing.assert_array_equal(back.weights[name], matrix)


def test_what_is_written_is_read(disk: Disk):
    files = CheckpointFiles(disk.files)
    state = a_state()
    assert not files.is_there(URI)
    size = files.write(URI, state, "org/model")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
    paths = [f"{PLACE}/{name}" for name in (*names, "manifest.json")]
    assert set(disk.paths()) - {f"{PLACE}/current"} == set(paths)
    assert size == sum(len(disk.content(path)) for path in paths)
    files = CheckpointFiles(disk.files)
    assert files.is_there(URI)
    assert files.sizes(URI) == {name: len(disk.content(f"{PLACE}/{name}")) for name in names}
    back = files.read(URI, with_optimizer=True)
    assert (back.spec.rank, back.spec.alpha) == (3, 6)
    for name, matrix in state.weights.items():
        np.testing.assert_array_equal(back.weights[name], matrix)
    assert back.optimizer is not None and back.optimizer.step == 0


def test_a_file_is_read_in_parts(disk: Disk):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(), "org/model")
    whole = disk.content(WEIGHTS)
    parts = [files.read_part(URI, "adapter_model.safetensors", at, 100) for at in range(0, len(whole), 100)]
    assert b"".join(parts) == whole and len(parts) > 2
    assert files.url(URI, "adapter_model.safetensors").endswith("/adapter_model.safetensors")
    with pytest.raises(OSError):
        files.read_part(URI, "no-such-file", 0, 100)


def test_a_second_write_takes_the_place_of_the_first(disk: Disk):
    files = CheckpointFiles(disk.files)
    digests: set[str] = set()
    for seed in (1, 2):
        files.write(URI, a_state(seed), "org/model")
        digests.add(files.digest(URI))
    check_is(files, URI, 2)
    assert len(digests) == 2
    # A file of each name, so nothing is left of the first.
    assert len(disk.system.find(disk.root)) == len(disk.paths())


def test_who_looks_while_a_checkpoint_is_replaced_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A directory can't be renamed over another: between two renames there is none of that name."""
    files = CheckpointFiles(LocalFiles(tmp_path))
    files.write(URI, a_state(1), "org/model")
    first = files.digest(URI)
    looking: list[Future[str]] = []
    rename = os.rename

    with ThreadPoolExecutor() as pool:

        def rename_and_let_look(source: Path, target: Path) -> None:
            rename(source, target)
            if not (tmp_path / PLACE).exists():
                looking.append(pool.submit(files.digest, URI))
                wait(looking, timeout=0.2)

        monkeypatch.setattr(os, "rename", rename_and_let_look)
        files.write(URI, a_state(2), "org/model")
        assert [look.result() for look in looking] == [files.digest(URI)] != [first]


def test_whoever_reads_while_others_write_finds_one_whole(disk: Disk):
    """Of another process, so that no lock of the writer's helps. A local directory can be missing for a moment."""
    if disk.kind == "fsspec local":
        pytest.skip("an object appears when it is complete; a local file doesn't, so `LocalFiles` renames it")
    writer = CheckpointFiles(disk.files)
    reader = writer if disk.kind == "local" else CheckpointFiles(disk.files)
    writer.write(URI, a_state(0), "org/model")
    with ThreadPoolExecutor() as pool:
        writes = pool.submit(lambda: [writer.write(URI, a_state(seed), "org/model") for seed in range(8)])
        looks = 0
        while not writes.done() or looks < 3:
            assert len(reader.sizes(URI)) == 4
            looks += 1
            if disk.kind != "local":
                reader.read(URI, with_optimizer=True)
        writes.result()
    check_is(reader, URI, 7)


def test_a_copy_stays_when_its_source_goes(disk: Disk):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(4), "org/model")
    files.copy(URI, OTHER)
    files.delete(URI)
    assert not files.is_there(URI)
    assert {path.rpartition("/")[0] for path in disk.paths()} == {"run:train:1/weights/other"}
    check_is(files, OTHER, 4)
    files.delete(URI)  # a second time does no harm
    with pytest.raises(ServerFault, match="incomplete"):
        files.read(URI, with_optimizer=False)
    with pytest.raises(ServerFault, match="incomplete"):
        files.sizes(URI)
    with pytest.raises(ServerFault, match="incomplete"):
        files.digest(URI)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"]
)
def test_a_changed_or_missing_file_is_noticed(disk: Disk, name: str):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(), "org/model")
    damaged = bytearray(disk.content(f"{PLACE}/{name}"))
    damaged[-1] ^= 1
    disk.change(f"{PLACE}/{name}", bytes(damaged))
    with pytest.raises(ServerFault, match=name):
        files.read(URI, with_optimizer=False)
    with pytest.raises(ServerFault, match=name):
        files.copy(URI, OTHER)
    assert not files.is_there(OTHER)
    disk.change(f"{PLACE}/{name}", None)
    with pytest.raises(ServerFault, match="incomplete"):
        files.read(URI, with_optimizer=False)
    with pytest.raises(ServerFault, match=f"{name} is missing"):
        files.sizes(URI)


def test_an_optimizer_that_was_not_saved_is_said_to_be_missing(disk: Disk):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(with_optimizer=False), "org/model")
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        files.read(URI, with_optimizer=True)


def test_a_write_that_fails_leaves_what_was_there(disk: Disk, monkeypatch: pytest.MonkeyPatch):
    from twinkle.server.store import checkpoint_files

    files = CheckpointFiles(disk.files)

    def full_disk(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_files, "_write_manifest", full_disk)
        with pytest.raises(OSError):
            files.write(URI, a_state(), "org/model")
    assert disk.system.find(disk.root) == [] if disk.system.exists(disk.root) else True
    assert not files.is_there(URI)
    files.write(URI, a_state(1), "org/model")
    before = disk.paths()
    monkeypatch.setattr(checkpoint_files, "_write_manifest", full_disk)
    with pytest.raises(OSError):
        files.write(URI, a_state(2), "org/model")
    assert disk.paths() == before
    check_is(files, URI, 1)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", ".."])
def test_a_manifest_offers_nothing_outside_its_checkpoint(disk: Disk, name: str):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(), "org/model")
    entries = json.loads(disk.content(f"{PLACE}/manifest.json"))
    entries["files"][name] = {"sha256": "0" * 64, "size_bytes": 6}
    disk.change(f"{PLACE}/manifest.json", json.dumps(entries).encode())
    with pytest.raises(ServerFault, match="incomplete"):
        files.sizes(URI)


def test_a_file_that_became_shorter_is_not_offered(disk: Disk):
    files = CheckpointFiles(disk.files)
    files.write(URI, a_state(), "org/model")
    disk.change(WEIGHTS, disk.content(WEIGHTS)[:-1])
    with pytest.raises(ServerFault, match=r"adapter_model.safetensors is not as long"):
        files.sizes(URI)
