"""Which engines a server with several has, what each may use, and what `twinkle-server models` makes of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server import plan as planning
from twinkle.server.cli import app
from twinkle.server.config import ModelEntry, ServerConfig, load_config, parse_config
from twinkle.server.serve import models_command
from twinkle.server.serve.fleet_plan import plan_all, plan_file, server_id, share_out
from twinkle.server.serve.launch import _forget_wishes  # pyright: ignore[reportPrivateUsage]
from twinkle.server.store.database import Database


@pytest.fixture
def model(tmp_path: Path) -> str:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return str(directory)


@pytest.fixture
def other(model: str, tmp_path: Path) -> str:
    (tmp_path / "other").symlink_to(model)
    return str(tmp_path / "other")


def config(tmp_path: Path, models: list[dict[str, Any]], **ray: Any) -> ServerConfig:
    return parse_config({"models": models, "ray": ray, "storage": {"root": str(tmp_path / "storage")}})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "storage").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'storage' / 'twinkle.sqlite'}")
    yield database
    database.close()


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("gpus", "asked", "shares"),
    [
        (8, [None, None], [4, 4]),
        (8, [2, None, None], [2, 3, 3]),
        (8, [6, 2], [6, 2]),
        (0, [None, 3], [None, None]),
    ],
)
def test_gpus_are_shared_out_by_what_is_asked_and_then_equally(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: list[int | None], shares: list[int | None]
):
    monkeypatch.setattr(planning, "_found_gpus", lambda: gpus)
    entries = [ModelEntry(model_id="a/b", num_gpus=number) for number in asked]
    settings = parse_config({"models": [{"model_id": "a/b"}]})
    assert share_out(settings, entries, None) == shares


@pytest.mark.parametrize(
    ("found", "asked", "num_gpus", "words"),
    [
        (2, None, [None] * 3, r"3 engines, which take a GPU each at least.*2 can be used.*num_gpus: 0"),
        (4, None, [4, None], r"num_gpus: 4 in all.*4 can be used"),
        (8, 8, [1, None, None], r"ray\.num_gpus: 8 .*7 of them can't be shared out equally to 2 engines"),
        (8, 8, [4, 2], r"ray\.num_gpus: 8 .*2 of them can't be shared out"),
        (2, 4, [None], r"ray\.num_gpus: 4 GPUs are to be used, but this machine has 2"),
    ],
)
def test_what_does_not_come_out_is_named(
    monkeypatch: pytest.MonkeyPatch, found: int, asked: int | None, num_gpus: list[int | None], words: str
):
    monkeypatch.setattr(planning, "_found_gpus", lambda: found)
    entries = [ModelEntry(model_id="a/b", num_gpus=number) for number in num_gpus]
    settings = parse_config({"models": [{"model_id": "a/b"}], "ray": {"num_gpus": asked}})
    with pytest.raises(InvalidRequest, match=words):
        share_out(settings, entries, None)


def test_each_engine_is_planned_with_its_own_share(
    tmp_path: Path, model: str, other: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planning, "_found_gpus", lambda: 8)
    settings = config(
        tmp_path,
        [{"model_id": model, "replicas": 2}, {"model_id": other, "num_gpus": 4, "sampler": {"num_gpus": 1}}],
        num_gpus=8,
    )
    plans = plan_file(settings)
    assert [plan.num_ranks for plan in plans] == [2, 2, 3]
    assert [plan.samplers.processes if plan.samplers else None for plan in plans] == [0, 0, 1]
    [alone] = plan_file(parse_config({"model": {"model_id": model}}))
    assert alone.num_ranks == 8


# ---------------------------------------------------------------- rows


def test_engines_keep_their_names_and_what_is_listed_no_more_goes(
    tmp_path: Path, model: str, other: str, database: Database
):
    both = config(tmp_path, [{"model_id": model, "replicas": 2}, {"model_id": other}], num_gpus=0)
    server = server_id(both)
    assert server == server_id(both)
    assert list(plan_all(both, database, server, None)) == ["e1", "e2", "e3"]
    models_command.add(both, database, ModelEntry(model_id=other, max_lora_rank=7))
    plans = plan_all(both, database, server, None)
    assert list(plans) == ["e1", "e2", "e3", "e4"]
    assert [plan.model.max_lora_rank for plan in plans.values()] == [128, 128, 128, 7]
    fewer = config(tmp_path, [{"model_id": model, "max_lora_rank": 9}], num_gpus=0)
    plans = plan_all(fewer, database, server, None)
    assert list(plans) == ["e1", "e4"] and plans["e1"].model.max_lora_rank == 9
    wanted = {row.name: (row.wanted, row.state) for row in database.engines(server)}
    assert wanted["e2"] == wanted["e3"] == ("remove", "stopped")


def test_what_was_drained_or_removed_stays_so_until_the_server_is_started_anew(
    tmp_path: Path, model: str, database: Database
):
    settings = config(tmp_path, [{"model_id": model, "replicas": 3}], num_gpus=0)
    server = server_id(settings)
    plan_all(settings, database, server, None)
    models_command.set_wanted(settings, database, "e1", "drain")
    database.change_engine(server, "e1", state="stopped", moved_to="e2")
    models_command.set_wanted(settings, database, "e3", "remove")
    assert list(plan_all(settings, database, server, None)) == ["e2"]
    _forget_wishes(settings)
    # What names e1 means e2 for ever, so another engine comes in its place.
    assert list(plan_all(settings, database, server, None)) == ["e2", "e3", "e4"]
    assert [row.name for row in models_command.listed(settings, database)] == ["e2", "e3", "e4"]


def test_an_engine_that_has_given_its_runs_away_has_a_successor(
    tmp_path: Path, model: str, database: Database
):
    settings = config(tmp_path, [{"model_id": model, "replicas": 2}], num_gpus=0)
    server = server_id(settings)
    plan_all(settings, database, server, None)
    database.change_engine(server, "e1", state="stopped", moved_to="e2")
    assert list(plan_all(settings, database, server, None)) == ["e2", "e3"]


# ---------------------------------------------------------------- commands


@pytest.fixture
def file(tmp_path: Path, model: str) -> str:
    path = tmp_path / "server_config.yaml"
    path.write_text(
        f"models: [{{model_id: {model}, replicas: 2}}]\nray: {{num_gpus: 0}}\n"
        f"storage: {{root: {tmp_path / 'storage'}}}\n"
    )
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_write_what_the_server_reads(file: str, model: str, database: Database):
    settings = load_config(file)
    server = server_id(settings)
    plan_all(settings, database, server, None)
    added = run("add", model, "--no-wait", "--config", file, "--settings", "{max_lora_rank: 8}")
    assert added == "Engines to start: e3.\n"
    run("drain", "e1", "--no-wait", "--config", file)
    database.change_engine(server, "e2", state="running", runs=5)
    database.change_engine(server, "e3", state="failed", message="no room")
    heading, *lines = run("list", "--config", file).splitlines()
    assert heading.split()[:4] == ["ENGINE", "MODEL", "STATE", "RUNS"]
    assert [line.split()[0] for line in lines] == ["e1", "e2", "e3"]
    assert lines[1].split()[1:] == [model, "running", "5", "yes"]
    assert lines[2].split()[1:] == [model, "failed", "0", "no", "no", "room"]
    run("remove", model, "--no-wait", "--config", file)
    assert {row.wanted for row in database.engines(server)} == {"remove"}
    assert database.engines(server)[2].entry == f'{{"model_id":"{model}","max_lora_rank":8,"replicas":1}}'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("drain", "e9"), "e9: this server has no such engine or model; it has none"),
        (
            ("add", "a/b", "--settings", "{max_lora_rnk: 8}"),
            r"--settings: .*did you mean 'max_lora_rank'",
        ),
        (("add", "a/b", "--settings", "[1]"), "--settings: must be a YAML mapping"),
        (("add", "a/b", "--settings", "{"), "--settings: not YAML"),
    ],
)
def test_bad_arguments_are_named(file: str, arguments: tuple[str, ...], words: str):
    with pytest.raises(InvalidRequest, match=words):
        run(*arguments, "--config", file)


def test_a_server_with_one_model_says_how_it_could_have_more(tmp_path: Path, model: str):
    path = tmp_path / "one.yaml"
    path.write_text(f"model: {{model_id: {model}}}\nstorage: {{root: {tmp_path / 'storage'}}}\n")
    with pytest.raises(InvalidRequest, match="list it under `models`"):
        run("add", "a/b", "--config", str(path))


def test_waiting_tells_of_changes_failures_and_servers_that_do_not_answer(
    file: str, model: str, database: Database, monkeypatch: pytest.MonkeyPatch
):
    settings = load_config(file)
    rows = models_command.add(settings, database, ModelEntry(model_id=model))
    server, seen = server_id(settings), list[str]()
    monkeypatch.setattr(models_command, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(models_command, "_ANSWER_SECONDS", 0.05)
    with pytest.raises(ServerFault, match="no server does anything about it"):
        models_command.wait(database, rows, ["running"], lambda row: seen.append(row.state))
    database.change_engine(server, rows[0].name, state="failed", message="no such model")
    with pytest.raises(ServerFault, match="e1: no such model; the server goes on trying"):
        models_command.wait(database, rows, ["running"], lambda row: seen.append(row.state))
    database.change_engine(server, rows[0].name, state="running", message="")
    models_command.wait(database, rows, ["running"], lambda row: seen.append(row.state))
    assert seen == ["failed", "running"]
