"""The examples of `examples/deploy`: nothing runs here; they are checked by the schemas and linters of their kinds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import ValidationError

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("docker/Dockerfile.*"))
KUBERNETES_VERSION = "1.31"
MANIFESTS = sorted([*DEPLOY.glob("kubernetes/*.yaml"), *DEPLOY.glob("kuberay/*.yaml")])
CONFIG = "twinkle.yaml"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def run(*command: str | Path) -> None:
    """Programs of the environment's packages come first."""
    name, *rest = map(str, command)
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    assert program is not None, f"{name} is not in the environment: see hatch.toml"
    done = subprocess.run([program, *rest], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_kinds_are_there() -> None:
    assert len(DOCKERFILES) == 2
    assert len(MANIFESTS) == 2
    assert len(list(DEPLOY.rglob("*.sbatch"))) == 1


# ------------------------------------------------------------ the server's configuration


def configurations() -> Iterator[tuple[str, str]]:
    """By where it stands: files of their own, and those in ConfigMaps and Secrets."""
    for path in sorted(DEPLOY.glob(f"*/{CONFIG}")):
        if path not in MANIFESTS:
            yield path.relative_to(DEPLOY).as_posix(), path.read_text(encoding="utf-8")
    for path in MANIFESTS:
        for document in documents(path):
            for values in (document.get("data"), document.get("stringData")):
                if values and CONFIG in values:
                    yield f"{path.parent.name}/{path.name}: {document['kind']}", values[CONFIG]


CONFIGURATIONS = dict(configurations())


@pytest.mark.parametrize("where", CONFIGURATIONS)
def test_the_server_reads_its_configuration(where: str, tmp_path: Path) -> None:
    file = tmp_path / CONFIG
    file.write_text(CONFIGURATIONS[where], encoding="utf-8")
    config = load_config(file)
    assert config.auth.mode == "keys", "examples that others can reach are not open"
    assert config.server.host == "0.0.0.0", "loopback of a container is reached by nobody"
    if config.storage.database_url is not None:
        assert config.storage.database_url.startswith("postgresql+psycopg://")


@pytest.mark.parametrize("where", ["kuberay/raycluster.yaml: Secret", "slurm/twinkle.yaml"])
def test_servers_on_several_machines_join_the_cluster_that_is_there(where: str) -> None:
    assert yaml.safe_load(CONFIGURATIONS[where])["ray"]["address"] == "auto"


def test_a_wrong_key_would_be_found(tmp_path: Path) -> None:
    assert len(CONFIGURATIONS) == 4
    file = tmp_path / CONFIG
    file.write_text(CONFIGURATIONS["compose/twinkle.yaml"].replace("root:", "rot:"), encoding="utf-8")
    with pytest.raises(InvalidRequest, match="did you mean 'root'"):
        load_config(file)


# ------------------------------------------------------------ Kubernetes


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayCluster."""
    spec = document["spec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_manifests_fit_the_schemas(path: Path) -> None:
    for document in documents(path):
        if document["kind"] == "RayCluster":
            for pod in pods(document):
                validate(
                    {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": pod["spec"]}
                )
        else:
            validate(document)


def test_a_manifest_that_does_not_fit_would_be_found() -> None:
    [deployment] = [one for one in documents(DEPLOY / "kubernetes" / CONFIG) if one["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["ports"] = [{"containerPort": "http"}]
    with pytest.raises(ValidationError):
        validate(deployment)


def pod_specs(path: Path) -> list[dict[str, Any]]:
    """Of every kind that has pods."""
    found: list[dict[str, Any]] = []
    for document in documents(path):
        if document["kind"] == "RayCluster":
            found += [pod["spec"] for pod in pods(document)]
        elif document["kind"] == "Deployment":
            found.append(document["spec"]["template"]["spec"])
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_pods_mount_what_there_is_and_do_not_run_as_root(path: Path) -> None:
    specs = pod_specs(path)
    assert specs
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert not container["image"].endswith(":latest")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.parent.name)
def test_gpus_of_the_pods_are_those_of_the_configuration(path: Path) -> None:
    limits = [
        container["resources"]["limits"] for spec in pod_specs(path) for container in spec["containers"]
    ]
    [text] = [text for where, text in CONFIGURATIONS.items() if where.startswith(f"{path.parent.name}/")]
    assert (
        sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)
        == yaml.safe_load(text)["ray"]["num_gpus"]
    )


def test_a_ray_cluster_is_as_kuberay_takes_it() -> None:
    """Its own schema is not in any package: the keys that its API names as required, and the containers' names."""
    [cluster] = [
        one for one in documents(DEPLOY / "kuberay" / "raycluster.yaml") if one["kind"] == "RayCluster"
    ]
    assert cluster["apiVersion"] == "ray.io/v1"
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert "rayStartParams" in head
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", group["groupName"])
        assert "rayStartParams" in group


# ------------------------------------------------------------ Slurm, Docker, compose


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    run("bash", "-n", script)
    run("shellcheck", "--shell=bash", script)
    [python] = re.findall(
        r"<<'PYTHON'\n(.*?)^PYTHON$", script.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    compile(python, str(script), "exec")


def test_slurm_lends_as_many_gpus_as_the_configuration_has() -> None:
    script = (DEPLOY / "slurm" / "twinkle.sbatch").read_text(encoding="utf-8")
    lent = {
        name: int(value)
        for name, value in re.findall(r"^#SBATCH --(nodes|gpus-per-node)=(\d+)$", script, re.M)
    }
    config = yaml.safe_load(CONFIGURATIONS["slurm/twinkle.yaml"])
    assert lent["nodes"] * lent["gpus-per-node"] == config["ray"]["num_gpus"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(dockerfile: Path) -> None:
    # Programs that pip installs beside those that are named with their versions come from this repository.
    run("hadolint", "--ignore", "DL3013", dockerfile)
    text = dockerfile.read_text(encoding="utf-8")
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / source).is_dir(), source
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+\S*$", text, re.MULTILINE), "a release, not a moving tag"
    assert re.search(r"^USER (?!0)\d+:\d+$", text, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", text, re.MULTILINE)


def compose() -> dict[str, Any]:
    [document] = documents(DEPLOY / "compose" / "compose.yaml")
    return document


def compose_schema() -> dict[str, Any]:
    vendored = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    return json.loads(vendored.read_text(encoding="utf-8"))


def test_the_compose_file_fits_its_schema() -> None:
    jsonschema.validate(compose(), compose_schema())
    wrong = compose()
    wrong["services"]["server"]["port"] = 8000
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, compose_schema())


def test_the_compose_file_names_what_there_is() -> None:
    document = compose()
    services = document["services"]
    build = services["server"]["build"]
    context = (DEPLOY / "compose" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith(("./", "$")) or source in document["volumes"], volume
        assert re.search(r":.+\d", service["image"]) or "build" in service, "a release, not a moving tag"
    url = yaml.safe_load(CONFIGURATIONS["compose/twinkle.yaml"])["storage"]["database_url"]
    own = services["database"]["environment"]
    assert f"{own['POSTGRES_USER']}:{own['POSTGRES_PASSWORD']}@database" in url
