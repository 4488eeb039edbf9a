"""The pages' blocks of code run as they stand, page by page, in a folder that looks like a checkout.

All Python of a page is one program; it runs first, since a shell looks at what it left. `pages.Block` says how a block
is marked that can't run. A server is the cookbook's with the tiny model, and takes the place of those that blocks name.
"""

import re
import subprocess
import sys
from pathlib import Path

import cookbook_server
import pages
import pytest
import yaml
from cookbook_server import DATA, MODEL
from running_server import RunningServer

from twinkle.server.config import load_config, parse_config

ROOT = pages.REPOSITORY
PAGES = {
    page.relative_to(ROOT).as_posix(): found
    for page in pages.kept("*.md")
    if "CHANGELOG" not in page.name and "benchmarks/results" not in page.as_posix()
    if (found := list(pages.blocks(page.read_text(encoding="utf-8"))))
}
LANGUAGES = {"", "bash", "python", "yaml"}
# Names of what a reader has -> what stands for it here; the server's address is known when it runs.
STAND_INS = {"Qwen/Qwen3.5-4B": MODEL, '"org/name"': repr(str(DATA / MODEL))}
ADDRESSES = ("http://gpu-host:8000", "http://localhost:8000")
# Programs that a reader has, and that blocks start.
PROGRAMS = {
    "train.py": "import sys, tinker\nprint(tinker.ServiceClient().get_server_capabilities(), sys.argv)\n"
}

# What differs from a reader's shell: nothing is installed (test_pages.py looks at these lines), what would start a
# server only reads its configuration, and programs of the cookbook train the tiny model for a moment, once in all.
SHELL = r"""
set -euo pipefail
pip() { :; }
once() {
    local done="$DONE/$(printf '%s ' "$@" | md5sum | cut -c -32)"
    if [ ! -e "$done" ]; then "$@"; touch "$done"; fi
}
check_config() { once command twinkle-server check-config --config "$1" --offline; }
twinkle-server() {
    case $1 in
        launch | check-config) check_config "$3" ;;
        *) command twinkle-server "$@" ;;
    esac
}
python() {
    case $1 in
        */server.py) check_config "$(dirname "$1")/${2:-server_config.yaml}" ;;
        */self_cognition.py) once command python "$@" --base-model "$MODEL" --epochs 1 ;;
        */grpo.py) once command python "$@" --base-model "$MODEL" --steps 1 ;;
        cookbook/client/*) once command python "$@" --base-model "$MODEL" ;;
        *) command python "$@" ;;
    esac
}
"""


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_of_a_known_language_and_say_why_they_do_not_run(name: str) -> None:
    for block in PAGES[name]:
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        shell_like = re.search(
            r"^(pip|python|scripts/hatch|twinkle runs|twinkle-server launch|export|cp) ",
            block.text,
            re.MULTILINE,
        )
        assert block.language or not shell_like, f"{name}:{block.line} is shell: mark it so"


def test_few_blocks_are_not_run() -> None:
    """Each for a reason; one more has to be worth it."""
    why = [f"{name}: {block.why_not}" for name, found in PAGES.items() for block in found if block.why_not]
    assert len(why) <= 9, why


@pytest.mark.parametrize("name", [name for name in PAGES if any(b.language == "yaml" for b in PAGES[name])])
def test_configurations_are_valid(name: str) -> None:
    for block in PAGES[name]:
        if block.language == "yaml":
            values = yaml.safe_load(block.text)
            model = {} if "models" in values else {"model": {"model_id": MODEL}}
            parse_config({**model, **values}, where=f"{name}:{block.line}")


def test_the_cookbooks_configurations_are_valid() -> None:
    found = sorted(cookbook_server.SERVERS.glob("*/*.yaml"))
    assert len(found) == 4
    for path in found:
        load_config(path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the repository's programs, the README's configuration, and what else a reader has."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("cookbook", "packages", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    [config] = [block.text for block in PAGES["README.md"] if block.text.startswith("# server_config.yaml")]
    (folder / "server_config.yaml").write_text(config, encoding="utf-8")
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Marks of commands that have run."""
    return tmp_path_factory.mktemp("done")


def runnable(name: str, language: str) -> list[pages.Block]:
    return [block for block in PAGES[name] if block.language == language and block.why_not is None]


@pytest.mark.serve
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name", [name for name in PAGES if runnable(name, "python") or runnable(name, "bash")]
)
def test_blocks_run(name: str, checkout: Path, done: Path, tiny_server: RunningServer) -> None:
    own = {"HOME": str(checkout.parent), "MODEL": MODEL, "DONE": str(done), "TINKER_TELEMETRY": "0"}
    environment = cookbook_server.environment(**own, TWINKLE_BASE_URL=tiny_server.base_url)

    def run(command: list[str], what: str) -> None:
        ended = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", timeout=300
        )
        assert ended.returncode == 0, f"{what}\n{ended.stdout}\n{ended.stderr}"

    def as_here(text: str) -> str:
        for there, here in {**STAND_INS, **dict.fromkeys(ADDRESSES, tiny_server.base_url)}.items():
            text = text.replace(there, here)
        return text

    if program := runnable(name, "python"):
        script = checkout / "page.py"
        script.write_text(as_here("\n".join(block.text for block in program)), encoding="utf-8")
        run([sys.executable, "-W", "ignore", str(script)], name)
    for block in runnable(name, "bash"):
        run(["bash", "-c", SHELL + as_here(block.text)], f"{name}:{block.line}")
