"""What can be told of the program that runs: whether it would take an option."""

import re
import sys
from pathlib import Path
from typing import Final

# Libraries, and what is in Python itself, by which a program gets at its arguments.
_READERS: Final = re.compile(
    r"\bargv\b|argparse|ArgumentParser|\b(getopt|optparse|click|typer|fire|tyro|chz|docopt|absl|hydra|draccus)\b"
)


def takes_option(option: str) -> bool:
    """Whether the program that runs can be started again with `option`, such as "--resume".

    Only a script that shows that it can't, and a notebook or a prompt, are told apart from the rest: of a program that
    was installed, or started by `-m`, nothing is known.
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
