"""Which files of a folder hold a subset and a split, judging by their names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from twinkle.dataset.readers import READERS
from twinkle.protocol.errors import InvalidRequest, NotFound

DATA_FILES: Final = tuple(f"*{suffix}" for suffix in READERS)
"""Globs of the files to download from a hub."""

# Names of the usual splits in file names.
_SPLITS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

# JSON files that describe a repository and contain no rows.
_NOT_DATA: Final = frozenset(
    {
        "config.json",
        "configuration.json",
        "dataset_dict.json",
        "dataset_info.json",
        "dataset_infos.json",
        "state.json",
    }
)


def find_files(root: Path, subset: str | None = None, split: str | None = None) -> list[Path]:
    """The data files below `root`, sorted by name, or `root` itself if it is a file.

    Raises:
        NotFound: if there are none, or none of that subset or split; the message lists what exists.
        InvalidRequest: if a subset or split of a single file is requested.
    """
    if root.is_file():
        if subset is not None or split is not None:
            raise InvalidRequest(
                f"{root} is a single file: give neither subset nor split, or give its folder"
            )
        return [root]
    files = _data_files(root)
    if not files:
        raise NotFound(f"{root} holds no data files ({', '.join(READERS)})")
    names = ", ".join(str(file.relative_to(root)) for file in files[:20]) + (
        ", ..." if len(files) > 20 else ""
    )
    if subset is not None:
        files = _of_subset(files, root, subset)
        if not files:
            raise NotFound(f"subset: {root} has no folder or file named for {subset!r}; it holds {names}")
    if split is not None:
        files = _of_split(files, root, split)
        if not files:
            raise NotFound(f"split: {root} has no file named for {split!r}; it holds {names}")
    return files


def _data_files(root: Path) -> list[Path]:
    """All data files but hidden ones; of a file in several formats, only the first."""
    by_stem: dict[Path, Path] = {}
    rank = {suffix: position for position, suffix in enumerate(READERS)}
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
        if hidden or path.suffix.lower() not in rank or path.name in _NOT_DATA or not path.is_file():
            continue
        stem = path.with_suffix("")
        if stem not in by_stem or rank[path.suffix.lower()] < rank[by_stem[stem].suffix.lower()]:
            by_stem[stem] = path
    return sorted(by_stem.values())


def _of_subset(files: Sequence[Path], root: Path, subset: str) -> list[Path]:
    in_folder = [file for file in files if _below(file.parent.relative_to(root), subset)]
    return in_folder or [file for file in files if _names(file.stem, [subset])]


def _below(folder: Path, subset: str) -> bool:
    """Whether a folder is, or is below, one named `subset` (which may have several parts)."""
    return f"/{subset.strip('/')}/" in f"/{folder.as_posix()}/"


def _of_split(files: Sequence[Path], root: Path, split: str) -> list[Path]:
    words = _SPLITS.get(split, (split,))
    named = [file for file in files if _names(str(file.relative_to(root).with_suffix("")), words)]
    if named or split != "train":
        return named
    others = [word for words in _SPLITS.values() for word in words]
    return [file for file in files if not _names(str(file.relative_to(root).with_suffix("")), others)]


def _names(name: str, words: Iterable[str]) -> bool:
    """Whether a file's path contains one of the words as a whole word: `train-00000-of-00001`, `data/test2`, not
    `trainer`.
    """
    either = "|".join(re.escape(word.lower()) for word in words)
    return re.search(rf"(?<![a-z0-9])({either})(?![a-z])", name.lower()) is not None
