"""Finds out whether the running program would accept an option."""

import re
import sys
from pathlib import Path
from typing import Final

# Libraries and modules by which programs read their arguments.
_READERS: Final = re.compile(
    r"\bargv\b|argparse|ArgumentParser|\b(getopt|optparse|click|typer|fire|tyro|chz|docopt|absl|hydra|draccus)\b"
)


def takes_option(option: str) -> bool:
    """Whether the running program can be started again with `option`, such as "--resume".

    False only for scripts that visibly don't read it, notebooks and prompts; nothing is known about programs that were
    installed, or started with `-m`.
    """
    main = sys.modules.get("__main__")
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return False
    path = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or not str(path).endswith(".py"):
        return True
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    name = option.lstrip("-").replace("-", "_")
    return option in text or (name in text and _READERS.search(text) is not None)
