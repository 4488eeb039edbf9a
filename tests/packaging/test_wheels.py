"""The wheels as they would be released: what is in them, and that they work where they are installed.

`twinkle` and `twinkle.server` come from two distributions: both have to work from wheels, from the tree, and mixed. The
client's promise is a bare environment that stays small and knows neither torch nor ray.
"""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Distribution -> the one directory that its modules are below.
MODULES = {
    "twinkle-core": "twinkle/",
    "twinkle-client": "twinkle_client/",
    "twinkle-tinker-patch": "twinkle_tinker_patch/",
    "twinkle-server": "twinkle/server/",
    "twinkle-megatron": "twinkle_megatron/",
}
HEAVY = ("datasets", "peft", "ray", "sqlalchemy", "starlette", "torch", "transformers")
CLIENT_LIMIT_BYTES = 200 * 1024**2


def run(*command: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(python: Path, *what: str | Path) -> None:
    """Install into the environment of `python`, which needs no pip of its own."""
    run(sys.executable, "-m", "pip", "--python", python, "install", *what)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel of each package, by the distribution's name."""
    target = tmp_path_factory.mktemp("wheels")
    sources = [ROOT / "packages" / name for name in MODULES]
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", target, *sources)
    built = {path.name.split("-")[0].replace("_", "-"): path for path in target.glob("*.whl")}
    assert sorted(built) == sorted(MODULES)
    return built


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes an empty virtual environment; returns its Python."""

    def make() -> Path:
        directory = tmp_path_factory.mktemp("environment")
        venv.EnvBuilder(symlinks=True).create(directory)
        return directory / "bin" / "python"

    return make


@pytest.fixture(scope="session")
def client_environment(wheels: dict[str, Path], make_environment: Callable[[], Path]) -> Path:
    """Python of an environment that has the client's wheel and what it needs from the package index."""
    python = make_environment()
    own = [wheels["twinkle-core"], wheels["twinkle-client"]]
    install(python, *own)
    return python


@pytest.mark.parametrize("name", MODULES)
def test_a_wheel_has_its_own_modules_their_types_and_the_licence(name: str, wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels[name]) as wheel:
        files = wheel.namelist()
        (licence,) = [file for file in files if file.endswith("/LICENSE")]
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    modules = [file for file in files if ".dist-info/" not in file]
    assert f"{MODULES[name]}py.typed" in modules
    assert [file for file in modules if not file.startswith(MODULES[name])] == []


def test_the_servers_extra_is_megatrons_wheel(wheels: dict[str, Path]) -> None:
    """`pip install 'twinkle-server[megatron]'`: each names the other, in a range that has its version."""
    found = {name: metadata_of(wheels[name]) for name in ("twinkle-server", "twinkle-megatron")}
    needs = {
        name: {one.name: one for one in map(Requirement, metadata.get_all("Requires-Dist") or [])}
        for name, metadata in found.items()
    }
    assert found["twinkle-server"].get_all("Provides-Extra") == [
        "age",
        "gpu",
        "gpu-compiled",
        "megatron",
        "postgresql",
        "s3",
        "vllm",
    ]
    extra = needs["twinkle-server"]["twinkle-megatron"]
    assert str(extra.marker) == 'extra == "megatron"'
    assert extra.specifier.contains(found["twinkle-megatron"]["Version"])
    assert needs["twinkle-megatron"]["twinkle-server"].specifier.contains(found["twinkle-server"]["Version"])
    assert "megatron-core" in needs["twinkle-megatron"] and "megatron-core" not in needs["twinkle-server"]
    with zipfile.ZipFile(wheels["twinkle-megatron"]) as wheel:
        [points] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
        assert "megatron = twinkle_megatron.backend:MegatronBackend" in wheel.read(points).decode()


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(files.read(name))


def test_core_and_server_share_no_file(wheels: dict[str, Path]) -> None:
    core, server = (
        set(zipfile.ZipFile(wheels[name]).namelist()) for name in ("twinkle-core", "twinkle-server")
    )
    assert core & server == set()


@pytest.mark.parametrize("core", ["wheel", "editable"])
@pytest.mark.parametrize("server", ["wheel", "editable"])
def test_core_and_server_work_together(
    core: str, server: str, wheels: dict[str, Path], make_environment: Callable[[], Path]
) -> None:
    python = make_environment()
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # What they depend on comes from the environment of this test. The path alone does that: its .pth files, and with
    # them its own editable installs, stay unread.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    what: list[str | Path] = []
    for name, form in (("twinkle-core", core), ("twinkle-server", server)):
        what += [wheels[name]] if form == "wheel" else ["--editable", ROOT / "packages" / name]
    install(python, "--no-deps", "--no-build-isolation", *what)
    code = (
        "import twinkle.protocol.codec, twinkle.server.backends.protocol;"
        "print(twinkle.protocol.codec.__file__); print(twinkle.server.backends.protocol.__file__)"
    )
    found = run(python, "-I", "-c", code).splitlines()
    for path, form in zip(found, (core, server), strict=True):
        assert Path(path).is_relative_to(site if form == "wheel" else ROOT / "packages")


@pytest.mark.network
def test_nothing_heavy_is_installed(client_environment: Path) -> None:
    code = f"from importlib.util import find_spec; print([n for n in {HEAVY} if find_spec(n)])"
    assert run(client_environment, "-I", "-c", code).strip() == "[]"


@pytest.mark.network
def test_the_installation_is_small(client_environment: Path) -> None:
    environment = client_environment.parent.parent
    size = sum(path.lstat().st_size for path in environment.rglob("*"))
    assert size < CLIENT_LIMIT_BYTES


def modules_of(wheel: Path) -> list[str]:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]


@pytest.mark.network
@pytest.mark.parametrize("environment", ["bare", "with everything"])
def test_no_module_of_the_client_loads_anything_heavy(
    environment: str, wheels: dict[str, Path], client_environment: Path
) -> None:
    python = client_environment if environment == "bare" else sys.executable
    modules = modules_of(wheels["twinkle-core"]) + modules_of(wheels["twinkle-client"])
    code = f"import sys, {', '.join(modules)}; print([n for n in {HEAVY} if n in sys.modules])"
    assert run(python, "-I", "-c", code).strip() == "[]"


@pytest.mark.network
def test_local_mode_says_what_to_install(client_environment: Path) -> None:
    code = """
import twinkle
try:
    twinkle.ServiceClient
except ImportError as error:
    print(error)
"""
    assert "pip install 'twinkle-server'" in run(client_environment, "-I", "-c", code)
