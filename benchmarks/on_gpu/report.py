"""What a run has found, written to its folder after each line, since the run may be cut off at any moment."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

Row: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["running", "passed", "failed", "skipped"]


class Skipped(Exception):
    """Raised by a part that can't be done here, with the reason."""


@dataclass
class Part:
    """
    Attributes:
        rows: a table; values are numbers, strings or None.
        notes: lines that say what the table doesn't.
        problems: what went wrong; the part has failed if there is any.
        seconds: that it took, None while it runs.
    """

    name: str
    status: Status = "running"
    rows: list[Row] = field(default_factory=list[Row])
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    seconds: float | None = None


class Report:
    """The parts of one run, in `report.json` and `report.md` of a folder, and the time that is left for further ones.

    Attributes:
        parts: in the order of their beginnings.
    """

    def __init__(self, directory: Path, minutes: float, facts: Row) -> None:
        """
        Args:
            directory: is made if it isn't there.
            minutes: for all parts together, from now on.
            facts: about device, versions and command, for the head of both files.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.parts: list[Part] = []
        self._directory = directory
        self._facts = facts
        self._ends = time.monotonic() + 60 * minutes
        self._write()

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    @property
    def failed(self) -> list[str]:
        """Names of the parts that have failed."""
        return [part.name for part in self.parts if part.status == "failed"]

    def do(self, name: str, work: Callable[[Part], None], needs_seconds: float = 0) -> None:
        """Do a part. Whatever it raises is written down, and the next part can be done.

        Args:
            needs_seconds: with less time left the part is skipped.
        """
        part = Part(name)
        self.parts.append(part)
        began = time.monotonic()
        if self.seconds_left < needs_seconds:
            part.status = "skipped"
            part.notes.append(
                f"{self.seconds_left:.0f} s were left of the {needs_seconds:.0f} that it may take"
            )
        else:
            self._write()
            self._try(part, work)
        part.seconds = round(time.monotonic() - began, 2)
        self._write()
        print(f"{part.status:8} {part.seconds:7.1f} s  {name}", flush=True)

    def _try(self, part: Part, work: Callable[[Part], None]) -> None:
        try:
            _release()
            work(part)
        except Skipped as reason:
            part.status = "skipped"
            part.notes.append(str(reason))
        except Exception:
            part.problems.append(traceback.format_exc())
        if part.status == "running":
            part.status = "failed" if part.problems else "passed"

    def attempt(self, part: Part, what: str, work: Callable[[], object]) -> None:
        """Do one of several things of a part; if it raises, the part has failed, and the next one can be done."""
        try:
            work()
            return
        except Exception:
            part.problems.append(f"{what}: {traceback.format_exc()}")
        self._write()
        _release()

    def add(self, part: Part, row: Row) -> None:
        """A line of a part's table."""
        part.rows.append(row)
        self._write()

    def _write(self) -> None:
        parts = [vars(part) for part in self.parts]
        whole = json.dumps({"facts": self._facts, "parts": parts}, indent=1, default=str)
        for name, text in (("report.json", whole), ("report.md", markdown(self._facts, self.parts))):
            path = self._directory / name
            fresh = path.with_suffix(path.suffix + ".new")
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(path)


def _release() -> None:
    """Memory that earlier parts held, and the frames of their exceptions, is not to be missing in the next one."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def markdown(facts: Row, parts: list[Part]) -> str:
    """A section for each part: its table, notes and problems."""
    lines = [
        "# A run on one device",
        "",
        *table([{"": name, "value": value} for name, value in facts.items()]),
    ]
    for part in parts:
        took = "" if part.seconds is None else f", {part.seconds:.1f} s"
        lines += ["", f"## {part.name}: {part.status}{took}"]
        if part.rows:
            lines += ["", *table(part.rows)]
        lines += [line for note in part.notes for line in ("", note)]
        for problem in part.problems:
            lines += ["", "```", problem.rstrip(), "```"]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """A Markdown table; its columns are all keys of the rows, in the order in which they first come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")
