"""What the processes of Ray write: the server's log, and whatever else libraries print."""

from __future__ import annotations

import logging
import re
from importlib import import_module
from typing import Any, cast

from twinkle.server.logs import received

log = logging.getLogger("twinkle.output")

_CODES = re.compile(r"\x1b\[[0-9;]*m")
# A progress bar is drawn for a terminal, and there is none.
_BAR = re.compile(r"\d+%\||\[\d+:\d+[<,]|\dit/s\]|\ds/it\]")
# Not one of the server's: what Ray says of lost processes, say, which the server says in its own words.
_OF_RAY = ("raylet", "autoscaler", "gcs_server")


def show_workers_output() -> None:
    """Show it in this process's log, in place of Ray's own printing. To be called when Ray has been started."""
    streams = cast(Any, import_module("ray._private.worker")).global_worker_stdstream_dispatcher
    streams.remove_handler("ray_print_logs")
    streams.add_handler("twinkle", _show)


def _show(batch: dict[str, Any]) -> None:
    process = str(batch.get("actor_name") or batch.get("task_name") or "")
    for line in batch.get("lines", []):
        record = received(line)
        if record is not None:
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
            continue
        text = _CODES.sub("", line).rstrip()
        if text and not _BAR.search(text):
            level = logging.DEBUG if batch.get("pid") in _OF_RAY else logging.INFO
            log.log(level, "%s", text, extra={"source": process or batch.get("pid")})
