"""The file systems that checkpoints and snapshots are kept on: what is promised holds on each."""

from __future__ import annotations

from pathlib import Path

import pytest
from disks import Disk

from twinkle.server.store.files import LocalFiles
from twinkle.server.store.scratch import Scratch
from twinkle.server.store.shared_files import SharedFiles, open_shared


@pytest.fixture(params=["local", "fsspec local", "fsspec memory", "s3"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    import fsspec

    scratch = tmp_path / "scratch"
    local, memory = fsspec.filesystem("file", auto_mkdir=True), fsspec.filesystem("memory")
    root = str(tmp_path / "root")
    match request.param:
        case "local":
            return Disk("local", lambda: LocalFiles(Path(root)), local, root)
        case "fsspec local":
            return Disk("fsspec local", lambda: SharedFiles(local, root, Scratch(scratch)), local, root)
        case "fsspec memory":
            return Disk("fsspec memory", lambda: SharedFiles(memory, root, Scratch(scratch)), memory, root)
        case _:
            url = request.getfixturevalue("s3").new_root()
            other = fsspec.filesystem("s3", use_listings_cache=False)
            return Disk("s3", lambda: open_shared(url, scratch), other, url.removeprefix("s3://"))
