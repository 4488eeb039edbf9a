"""The runner, in real processes: what a program can see of it, and that the SDK is open in all of its processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import RecordingServer

RUNNER = [sys.executable, "-m", "twinkle_tinker_patch"]

# What a program can tell about how it was started, apart from its environment.
SELF_PORTRAIT = """
import json, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": globals().get("__file__"), "path": sys.path,
    "spec": __spec__ and __spec__.name, "main": sys.modules["__main__"].__dict__ is globals(),
    "flags": str(sys.flags), "warnings": sys.warnoptions, "sdk": "tinker" in sys.modules,
}))
"""

# A key that the SDK refuses unless it is patched, and what it says then.
TOKEN = """
def token():
    from tinker.lib._auth_token_provider import ApiKeyAuthProvider
    try:
        return ApiKeyAuthProvider("sk-any")._token
    except Exception as error:
        return str(error)
"""
UNPATCHED = "The api_key must start with the 'tml-' prefix"


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def output(command: list[str], cwd: Path, **environment: str) -> Any:
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "programs" / "train.py"
    path.parent.mkdir()
    return path


@pytest.mark.parametrize(
    "program",
    [
        ["programs/train.py", "--help", "--base-url", "x", "-m", "y"],
        ["-m", "programs.train", "-h"],
        ["-c", SELF_PORTRAIT, "a b", ""],
    ],
)
def test_a_program_sees_what_it_would_see_without_us(
    tmp_path: Path, script: Path, program: list[str]
) -> None:
    script.write_text(SELF_PORTRAIT, encoding="utf-8")
    alone = output([sys.executable, *program], tmp_path)
    assert alone["argv"][1:] == program[1 if program[0] != "-m" else 2 :][-len(alone["argv"][1:]) :]
    assert output([*RUNNER, *program], tmp_path) == alone
    assert output([*RUNNER, "--base-url", "http://x", "--api-key=k", *program], tmp_path) == alone


def test_pythons_own_flags_are_kept(tmp_path: Path, script: Path) -> None:
    script.write_text(SELF_PORTRAIT, encoding="utf-8")
    flags = ["-X", "dev", "-W", "ignore", "-O"]
    alone = output([sys.executable, *flags, str(script), "x"], tmp_path)
    assert output([sys.executable, *flags, "-m", "twinkle_tinker_patch", str(script), "x"], tmp_path) == alone


@pytest.mark.parametrize("ending", ["import sys; sys.exit(7)", "def f():\n    raise KeyError('a')\nf()"])
def test_a_program_ends_as_it_would_without_us(tmp_path: Path, script: Path, ending: str) -> None:
    script.write_text(f"print('begun')\n{ending}\n", encoding="utf-8")
    alone, ours = run([sys.executable, str(script)], tmp_path), run([*RUNNER, str(script)], tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert ours.returncode in {1, 7}


def test_the_sdk_is_open_in_the_program_and_in_its_children(tmp_path: Path, script: Path) -> None:
    script.write_text(
        TOKEN
        + """
if __name__ == "__main__":
    import inspect, json, multiprocessing, os, subprocess, sys, tinker
    child = [sys.executable, "-c", inspect.getsource(token) + "print(token())"]
    out = lambda **more: subprocess.check_output(child, text=True, env=os.environ | more).strip()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps({
            "here": token(), "spawned": pool.apply(token), "started": out(),
            "turned off": out(TWINKLE_TINKER_PATCH="0"),
            "loader": type(tinker.__spec__.loader).__name__, "source": inspect.getsource(tinker)[:6],
        }))
""",
        encoding="utf-8",
    )
    assert output([*RUNNER, str(script)], tmp_path) == {
        "here": "sk-any",
        "spawned": "sk-any",
        "started": "sk-any",
        "turned off": UNPATCHED,
        "loader": "SourceFileLoader",
        "source": "import",
    }


def test_a_program_reaches_the_server_by_the_sdk_and_by_the_command_line(
    tmp_path: Path, script: Path, server: RecordingServer
) -> None:
    script.write_text(
        """
import subprocess, sys, tinker
client = tinker.ServiceClient().create_sampling_client(model_path="twinkle://r/sampler_weights/a", base_model="m")
if hasattr(client, "result"):  # since 0.38
    client.result(timeout=60)
subprocess.run([sys.argv[1], "checkpoint", "publish", "twinkle://r/weights/a"], check=True)
""",
        encoding="utf-8",
    )
    command_line = str(Path(sys.executable).parent / "tinker")
    command = [*RUNNER, "--base-url", server.base_url, "--api-key", "sk-any", str(script), command_line]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert server.only("/create_sampling_session").body["model_path"] == "tinker://r/sampler_weights/a"
    assert server.asked("/training_runs/r/checkpoints/weights/a/publish")
    assert {request.api_key for request in server.seen} == {"sk-any"}


def test_a_process_that_doesnt_import_the_sdk_starts_without_it(tmp_path: Path) -> None:
    code = """
import importlib.util, json, sys
assert importlib.util.find_spec("tinker")
print(json.dumps([name for name in ("tinker", "httpx", "transformers") if name in sys.modules]))
"""
    assert output([*RUNNER, "-c", code], tmp_path) == []


SETTINGS = """
import json, os
print(json.dumps([os.environ.get("TINKER_BASE_URL"), os.environ.get("TINKER_API_KEY")]))
"""


@pytest.mark.parametrize(
    ("options", "environment", "seen"),
    [
        ([], {}, ["http://localhost:8000", "tml-none"]),
        (
            [],
            {"TWINKLE_BASE_URL": "http://twinkle", "TWINKLE_API_KEY": "sk-1"},
            ["http://twinkle", "sk-1"],
        ),
        (
            [],
            {
                "TWINKLE_BASE_URL": "http://twinkle",
                "TINKER_BASE_URL": "http://tinker",
                "TINKER_API_KEY": "tml-2",
            },
            ["http://tinker", "tml-2"],
        ),
        (
            ["--api-key", "sk-3", "--base-url=https://given/"],
            {"TINKER_BASE_URL": "http://tinker", "TINKER_API_KEY": "tml-2"},
            ["https://given", "sk-3"],
        ),
        ([], {"TINKER_CREDENTIAL_CMD": "echo sk-4"}, ["http://localhost:8000", None]),
    ],
)
def test_address_and_key_come_from_options_then_the_environment(
    tmp_path: Path, options: list[str], environment: dict[str, str], seen: list[str | None]
) -> None:
    assert output([*RUNNER, *options, "-c", SETTINGS], tmp_path, **environment) == seen


def test_a_program_may_call_init_tinker_client_itself(tmp_path: Path) -> None:
    code = (
        TOKEN
        + """
import json, os
from twinkle import init_tinker_client
from twinkle_tinker_patch import unpatch
init_tinker_client(base_url="http://from-the-program:1")
url, opened = os.environ["TINKER_BASE_URL"], token()
unpatch()
print(json.dumps([url, opened, token()]))
"""
    )
    assert output([*RUNNER, "-c", code], tmp_path) == ["http://from-the-program:1", "sk-any", UNPATCHED]


def test_the_environments_own_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.own = __file__\n", encoding="utf-8")
    code = (
        TOKEN
        + "import json, sys, sitecustomize\nprint(json.dumps([sys.own, sitecustomize.__file__, token()]))"
    )
    theirs = str(tmp_path / "site" / "sitecustomize.py")
    assert output([*RUNNER, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site")) == [
        theirs,
        theirs,
        "sk-any",
    ]


@pytest.mark.skipif(
    sys.prefix == sys.base_prefix, reason="needs a Python without this package: that of the venv"
)
def test_a_child_of_another_environment_starts_in_silence(tmp_path: Path) -> None:
    other: str = sys._base_executable  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    code = f"import subprocess; subprocess.run([{other!r}, '-c', 'print(1)'], check=True)"
    done = run([*RUNNER, "-c", code], tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1", "")


def test_an_sdk_that_cant_be_opened_is_refused_as_it_is_imported(tmp_path: Path, script: Path) -> None:
    (script.parent / "tinker").mkdir()
    (script.parent / "tinker" / "__init__.py").write_text("__version__ = '0.10.0'\n", encoding="utf-8")
    script.write_text("import tinker\n", encoding="utf-8")
    done = run([*RUNNER, str(script)], tmp_path)
    assert done.returncode == 1
    assert "ImportError: init_tinker_client can't open the installed Tinker SDK 0.10.0" in done.stderr


def test_a_missing_sdk_is_pythons_own_error(tmp_path: Path, script: Path) -> None:
    script.write_text(
        "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\nimport tinker\n",
        encoding="utf-8",
    )
    done = run([*RUNNER, str(script)], tmp_path)
    assert "ModuleNotFoundError: No module named 'tinker'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "what is to be run?"),
        (["-m"], "what is to be run?"),
        (["--api-key", "k"], "what is to be run?"),
        (["--base-url"], "--base-url needs a value"),
        (["--url", "x", "train.py"], "unknown option --url"),
        (["--base-url", "gpu-host:8000", "train.py"], "'gpu-host:8000' must begin with http://"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, arguments: list[str], reason: str) -> None:
    done = run([*RUNNER, *arguments], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_isolated_python_is_refused(tmp_path: Path) -> None:
    done = run([sys.executable, "-I", "-m", "twinkle_tinker_patch", "-c", "pass"], tmp_path)
    assert done.returncode == 2
    assert "-I, -E and -S" in done.stderr


def test_help_shows_how_to_use_it(tmp_path: Path) -> None:
    done = run([*RUNNER, "--help"], tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m twinkle_tinker_patch")
    assert "-m tinker.cli checkpoint list" in done.stdout
