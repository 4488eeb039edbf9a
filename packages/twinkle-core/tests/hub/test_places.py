"""Which folder an id is, as long as no hub has to be asked."""

from pathlib import Path

import pytest

from twinkle import hub
from twinkle.protocol.errors import InvalidRequest, NotFound


@pytest.fixture(autouse=True)
def offline_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TWINKLE_HUB", "TWINKLE_HUB_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("id", ["ms://org/name.5-B", "hf://org/name.5-B", "org/name.5-B"])
def test_the_hub_root_comes_first_for_every_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id: str
) -> None:
    folder(tmp_path / "org" / "name.5-B")
    expected = folder(tmp_path / "root" / "org" / "name.5-B")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path / "root"))
    assert hub.resolve(id) == hub.resolve(id, "dataset") == expected


def test_the_hub_root_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TWINKLE_HUB_ROOT", "~/root")
    assert hub.resolve("ms://org/name") if folder(tmp_path / "root/org/name") else None


def test_a_bare_id_may_be_a_folder_here(tmp_path: Path) -> None:
    expected = folder(tmp_path / "org" / "name")
    assert hub.resolve("org/name") == expected
    deep = folder(tmp_path / "a b" / "c" / "d")
    assert hub.resolve("a b/c/d") == deep


@pytest.mark.parametrize("form", ["{}", "file://{}", "./a b", "~/a b", "../here/a b"])
def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    here = folder(tmp_path / "here")
    expected = folder(here / "a b")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    assert hub.resolve(form.format(expected)).samefile(expected)


def test_a_file_url_may_be_quoted_and_name_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a b.jsonl"
    file.write_text("", encoding="utf-8")
    assert hub.resolve(f"file://{tmp_path}/a%20b.jsonl") == file


@pytest.mark.parametrize("id", ["/no/such", "file:///no/such", "./no/such", "~/no/such"])
def test_a_path_that_is_not_there_is_not_asked_of_a_hub(id: str) -> None:
    with pytest.raises(NotFound, match="no such folder or file: /"):
        hub.resolve(id)


@pytest.mark.parametrize(
    "id",
    [
        "",
        "a/b/c",
        "ms://",
        "ms://org/..",
        "hf://../name",
        "hf://./x",
        "ms://org/na me",
        "ms://org//n",
        "org/na\nme",
        "ms:///etc",
    ],
)
def test_what_is_no_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id: str) -> None:
    folder(tmp_path / "root" / "org")
    monkeypatch.setenv("TWINKLE_HUB_ROOT", str(tmp_path / "root"))
    with pytest.raises(InvalidRequest, match="neither an existing path nor the id of a repository"):
        hub.resolve(id)


def test_other_schemes_are_refused_with_those_there_are() -> None:
    with pytest.raises(
        InvalidRequest, match="unknown scheme 's3'; allowed are ms://, hf://, file:// and none"
    ):
        hub.resolve("s3://bucket/key")


def test_a_hub_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_HUB", "github")
    with pytest.raises(InvalidRequest, match="TWINKLE_HUB=github: allowed are hf and ms"):
        hub.resolve("org/name")


def test_the_hubs_clients_are_not_loaded_for_local_folders(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from twinkle import hub; hub.resolve('.');"
        "import twinkle.template, twinkle.dataset, twinkle.dataloader, twinkle.preprocessor;"
        "heavy = {'huggingface_hub', 'modelscope_hub', 'torch', 'transformers', 'datasets', 'ray', 'pyarrow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("ms://org/name", "org/name"),
        ("hf://org/name/", "org/name"),
        ("org/name", "org/name"),
        ("hf://gpt2", "gpt2"),
        ("file:///a/b%20c", "/a/b c"),
        ("/a/b/", "/a/b"),
        ("other://x", "other://x"),
        ("", ""),
    ],
)
def test_plain_names_are_what_other_programs_load(id: str, name: str) -> None:
    assert hub.plain_name(id) == name
    assert hub.plain_name(name) == name


def test_the_plain_name_of_a_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for id in ("./models/a/", "~/models/a", "../" + tmp_path.name + "/models/a", "./models/./a"):
        assert hub.plain_name(id) == str(tmp_path / "models" / "a")
    assert hub.plain_name("my/models/a") == str(tmp_path / "my" / "models" / "a")
