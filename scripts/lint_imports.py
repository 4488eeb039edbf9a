"""Checks the import rules in `.importlinter` over all five packages.

`twinkle` is spread over two distributions, and a directory of the tree shows import-linter only one of them. So the
sources are laid together first, as an installation of the wheels lays them in site-packages.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent


def main(root: Path) -> int:
    """Lint the packages below `root`; the exit status of import-linter, 0 where every contract is kept."""
    with tempfile.TemporaryDirectory() as site:
        for source in sorted(root.glob("packages/*/src")):
            shutil.copytree(source, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        sys.path.insert(0, site)
        return lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
