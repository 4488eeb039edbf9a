"""What the pages say of the repository: links, files, packages, the newcomer's list."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pages
import pytest
from packaging.requirements import Requirement

ROOT = pages.REPOSITORY
PACKAGES = ROOT / "packages"
NAMES = {page.relative_to(ROOT).as_posix(): page for page in pages.kept("*.md")}
# What stands there was so on its day.
DATED = ("CHANGELOG.md", "benchmarks/results/")
SOURCES = [path.as_posix() for path in pages.kept("*.py")]
PRESENT = {name: page for name, page in NAMES.items() if not any(part in name for part in DATED)}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    broken: list[str] = []
    for link in pages.links(read(NAMES[name])):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = NAMES[name].parent / path if path else NAMES[name]
        if not target.exists() or (anchor and anchor not in pages.anchors(read(target))):
            broken.append(link)
    assert broken == []


def test_links_and_headings_are_read() -> None:
    text = (
        "# Two words: `x`\n## A\n## A\n[a](b.md) `[no](c.md)` [over\ntwo lines](#a-1)\n```\n[no](d.md)\n```\n"
    )
    assert pages.links(text) == ["b.md", "#a-1"]
    assert pages.anchors(text) == {"two-words-x", "a", "a-1"}


def files_named(text: str) -> list[str]:
    """Paths of Python files in backticks: with a folder before them, so that they can mean one file alone."""
    return re.findall(r"`([\w./]+/\w+\.py)`", text)


@pytest.mark.parametrize("name", PRESENT)
def test_files_that_are_named_are_there(name: str) -> None:
    named = files_named(read(PRESENT[name]))
    assert [one for one in named if not any(path.endswith(f"/{one}") for path in SOURCES)] == []


def tables_of_folders(text: str) -> list[tuple[str, list[str]]]:
    """Folder and files of each table whose head is a folder in backticks; a row's first cell names files."""
    found: list[tuple[str, list[str]]] = []
    for head, rows in re.findall(r"^\| `([\w/]+)/` \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        cells = [row.split("|")[1] for row in rows.splitlines()]
        found.append((head, [name for cell in cells for name in re.findall(r"`(\w+\.py)`", cell)]))
    return found


def test_a_table_of_a_folder_has_all_its_files_once() -> None:
    tables = tables_of_folders(read(ROOT / "docs" / "architecture.md"))
    assert len(tables) >= 2
    for folder, listed in tables:
        [path] = [path for path in PACKAGES.glob(f"*/src/**/{folder}") if path.is_dir()]
        own = [file.name for file in path.glob("*.py") if not file.name.startswith("_")]
        assert sorted(listed) == sorted(own), folder


def newcomers_list() -> list[Path]:
    """The numbered list that follows the sentence with "Read in this order" in docs/architecture.md."""
    text = read(ROOT / "docs" / "architecture.md")
    listed = re.search(r"Read in this order.*?\n\n((?:\d\. .*\n(?: +.*\n)*)+)", text)
    assert listed is not None, "docs/architecture.md has no numbered list after 'Read in this order'"
    names = re.findall(r"^\d\. `([^`]+)`", listed[1], re.MULTILINE)
    return [path for name in names for path in PACKAGES.glob(f"*/src/**/{name}")]


def test_a_newcomer_reads_seven_files_of_1500_lines_together() -> None:
    paths = newcomers_list()
    sizes = {path.relative_to(PACKAGES).as_posix(): len(read(path).splitlines()) for path in paths}
    assert len(sizes) == len(paths) == 7, sizes
    assert sum(sizes.values()) <= 1500, sizes


def install_lines() -> list[tuple[str, str]]:
    """All `pip install ...` of the pages, in blocks and in sentences: page and what follows."""
    found: list[tuple[str, str]] = []
    for name, page in PRESENT.items():
        for block in pages.blocks(read(page)):
            found += [(name, line) for line in re.findall(r"pip install ([^#\n]+)", block.text)]
        found += [(name, line) for line in re.findall(r"`pip install ([^`]+)`", read(page))]
    return found


def ours(name: str) -> str:
    return name.removeprefix("./packages/").strip("'\"")


def needed(requirement: str) -> set[str]:
    """Packages of this repository that one of them needs with these extras, itself and those of others included."""
    parsed = Requirement(requirement)
    project = tomllib.loads(read(PACKAGES / parsed.name / "pyproject.toml"))["project"]
    extras = project.get("optional-dependencies", {})
    wanted = [*project["dependencies"], *(one for extra in parsed.extras for one in extras[extra])]
    return {parsed.name}.union(
        *(needed(one) for one in wanted if Requirement(one).name.startswith("twinkle-"))
    )


def test_a_package_is_installed_with_all_that_it_needs_of_this_repository() -> None:
    """Nothing is published: pip finds them here or nowhere, so each command names the folders of all."""
    lines = install_lines()
    assert len(lines) > 8
    for page, line in lines:
        words = [word.strip("'\"") for word in line.split() if "twinkle" in word]
        assert [word for word in words if not word.startswith("./packages/")] == [], page
        given = {Requirement(ours(word)).name for word in words}
        assert set().union(*(needed(ours(word)) for word in words)) <= given, f"{page}: pip install {line}"


def test_pip_finds_the_folders_and_their_extras() -> None:
    words = {word.strip("'\"") for _, line in install_lines() for word in line.split() if "twinkle" in word}
    options = ("--dry-run", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *sorted(words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr
