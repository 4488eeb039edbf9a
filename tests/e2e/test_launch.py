"""Starting and ending a server as a user does, the wrong ways included."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import running_server
import yaml
from safetensors.numpy import load_file
from server_processes import processes_with, wait_for

pytestmark = pytest.mark.serve


def descendants(parent: int) -> set[int]:
    """Processes that a process started, and those that they started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in listed.splitlines():
        pid, ppid = map(int, line.split())
        children.setdefault(ppid, []).append(pid)
    found: set[int] = set()
    frontier = [parent]
    while frontier:
        frontier = [pid for ppid in frontier for pid in children.get(ppid, [])]
        found.update(frontier)
    return found


def alive(pids: set[int]) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    running = {int(pid) for pid, state in (line.split() for line in listed.splitlines()) if state[0] != "Z"}
    return pids & running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_and_every_process_of_it(
    hub_root: Path, tmp_path: Path, unused_port: int, number: signal.Signals
):
    server = running_server.start(running_server.write_config(tmp_path, unused_port), hub_root, unused_port)
    try:
        assert httpx.get(f"{server.base_url}/api/v1/healthz").json() == {"status": "ok"}
        started = descendants(server.process.pid)
        assert len(started) >= 5, "a raylet, its helpers, and the actors"
        said = "".join(server.lines)
        assert "on the CPU" in said and "Open mode" in said
    finally:
        code = server.stop(number)
    assert code == 0
    wait_for("the last line", lambda: any("Stopping." in line for line in server.lines))
    assert "Traceback" not in "".join(server.lines) and "SIGTERM" not in "".join(server.lines)
    assert wait_until_gone(started) == set()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.base_url}/api/v1/healthz")


def test_ctrl_c_while_several_engines_start_ends_all_of_them_at_once(
    hub_root: Path, tmp_path: Path, unused_port: int
):
    config = running_server.write_config(tmp_path, unused_port, model_extra="  replicas: 2\n")
    server = running_server.RunningServer("", running_server.launch(config, hub_root))
    wait_for("Serve, and so the engines' start", lambda: processes_with(server, "ServeController") != set())
    started = descendants(server.process.pid)
    server.process.send_signal(signal.SIGINT)
    _, said = server.process.communicate(timeout=running_server.STOP_SECONDS)
    assert server.process.returncode == 0
    assert said.endswith("Stopped before it was ready.\n") and "Traceback" not in said
    assert wait_until_gone(started) == set()


def test_a_killed_supervisor_takes_the_server_with_it(hub_root: Path, tmp_path: Path, unused_port: int):
    server = running_server.start(running_server.write_config(tmp_path, unused_port), hub_root, unused_port)
    started = descendants(server.process.pid)
    server.stop(signal.SIGKILL)
    assert wait_until_gone(started) == set()


def wait_until_gone(pids: set[int]) -> set[int]:
    """Those of the processes that are still there some seconds after their parent ended."""
    deadline = time.monotonic() + 15
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def run_launch(config: Path, hub_root: Path) -> tuple[int, str]:
    process = running_server.launch(config, hub_root)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_a_busy_port_is_said_at_once(hub_root: Path, tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, said = run_launch(running_server.write_config(tmp_path, port), hub_root)
    assert code == 1
    assert f"server.port: can't listen on 127.0.0.1:{port}" in said
    assert "Traceback" not in said


def test_a_model_that_cannot_be_found_is_said_with_the_places_looked_in(
    hub_root: Path, tmp_path: Path, unused_port: int
):
    config = running_server.write_config(tmp_path, unused_port, model_id="file:///nowhere/at-all")
    code, said = run_launch(config, hub_root)
    assert code == 1
    assert "/nowhere/at-all" in said
    assert "Traceback" not in said


def test_a_model_that_cannot_be_loaded_is_said_in_one_sentence(
    hub_root: Path, tmp_path: Path, unused_port: int
):
    model = tmp_path / "no-weights"
    model.mkdir()
    shutil.copy(hub_root / "Qwen/Qwen3.5-4B/config.json", model)
    code, said = run_launch(running_server.write_config(tmp_path, unused_port, model_id=str(model)), hub_root)
    assert code == 1
    assert "no-weights" in said and "no safetensors" in said and "download the model again" in said
    assert "Traceback" not in said


def test_a_misspelt_key_is_named_with_the_nearest_one(hub_root: Path, tmp_path: Path, unused_port: int):
    config = running_server.write_config(tmp_path, unused_port)
    config.write_text(config.read_text().replace("torch_dtype", "torch_dtpye"))
    code, said = run_launch(config, hub_root)
    assert code == 1
    assert "model.torch_dtpye: there is no such key; did you mean 'torch_dtype'?" in said


def check_config(config: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twinkle.server", "check-config", "--config", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


MISSION_YAML = (
    "model:\n  model_id: Qwen/Qwen3.5-4B\n  use_megatron: false\n  torch_dtype: bfloat16\n"
    "server:\n  host: 0.0.0.0\n  port: {port}\n  num_replicas: 1\nray:\n  num_gpus: 4\n"
)


def test_check_config_shows_the_missions_yaml_with_every_default(tmp_path: Path):
    config = tmp_path / "server_config.yaml"
    config.write_text(MISSION_YAML.format(port=8000))
    done = check_config(config, "--offline")
    assert done.returncode == 0 and done.stderr == ""
    assert "num_gpus: 4" in done.stdout
    assert "max_lora_rank: 128" in done.stdout


def test_check_config_prints_what_would_be_started(hub_root: Path, tmp_path: Path, unused_port: int):
    config = running_server.write_config(tmp_path, unused_port, layout={"data_parallel_size": 2})
    done = check_config(config, TWINKLE_HUB_ROOT=str(hub_root))
    assert done.returncode == 0 and done.stderr == ""
    assert yaml.safe_load(done.stdout)["model"]["data_parallel_size"] == 2
    planned = [line.split() for line in done.stdout.splitlines() if line.startswith("# ")]
    weights = sum(
        tensor.size * 4 for tensor in load_file(hub_root / "Qwen/Qwen3.5-4B/model.safetensors").values()
    )
    assert [(line[1], line[4], " ".join(line[5:-2])) for line in planned[-2:]] == [
        ("0", "CPU", "copy 1 of 2, transformers sampler"),
        ("1", "CPU", "copy 2 of 2, transformers sampler"),
    ]
    assert {tuple(line[-2:]) for line in planned[-2:]} == {(f"{weights / 1e6:.1f}", "MB")}


def test_check_config_says_one_fault_a_line(hub_root: Path, tmp_path: Path):
    config = tmp_path / "server_config.yaml"
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        config.write_text(MISSION_YAML.format(port=taken.getsockname()[1]))
        done = check_config(config, TWINKLE_HUB_ROOT=str(hub_root))
    assert done.returncode == 1
    port, gpus = done.stderr.splitlines()
    assert port.startswith("Error: server.port: can't listen on 0.0.0.0:")
    assert gpus.startswith("Error: ray.num_gpus: 4 GPUs are to be used, but this machine has 0;")
    done = check_config(config, TWINKLE_HUB_ROOT=str(hub_root), TWINKLE_DEVICE="cpu")
    assert done.returncode == 0 and done.stderr == "", "on the CPU it can be started as it is"


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


assert os.name == "posix", "processes are listed with ps"
