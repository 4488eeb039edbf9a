from pathlib import Path

import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.cli import describe
from twinkle.server.config import load_config, parse_config

MISSION = """\
model:
  model_id: Qwen/Qwen3.5-4B
  use_megatron: false
  torch_dtype: bfloat16
server:
  host: 0.0.0.0
  port: 8000
  num_replicas: 1
ray:
  num_gpus: 4
"""
MEGATRON = """\
model:
  model_id: Qwen/Qwen3.5-72B
  use_megatron: true
  torch_dtype: bfloat16
  tensor_parallel_size: 4
  pipeline_parallel_size: 2
server:
  host: 0.0.0.0
  port: 8000
ray:
  num_gpus: 8
"""


@pytest.mark.parametrize("text", [MISSION, MEGATRON])
def test_the_missions_files_are_valid_as_they_are(tmp_path: Path, text: str):
    path = tmp_path / "server_config.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.server.port == 8000
    assert config.model.torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"model_id": "x", "max_lora_rnk": 3}},
            r"model\.max_lora_rnk: .*did you mean 'max_lora_rank'",
        ),
        ({"model": {"model_id": "x"}, "sever": {}}, r"sever: .*did you mean 'server'"),
        (
            {"model": {"model_id": "x", "torch_dtype": "float16"}},
            r"model\.torch_dtype: .*float16 is not offered: .*use 'bfloat16', or 'float32'",
        ),
        ({"model": {"model_id": "x", "torch_dtype": "int8"}}, r"model\.torch_dtype: .*'bfloat16'"),
        ({"model": {"model_id": "x"}, "server": {"port": 99999}}, r"server\.port: .*65535"),
        (
            {"model": {"model_id": "x", "context_parallel_size": 2}},
            r"model: .*context_parallel_size is not offered.*sequence_parallel: true",
        ),
        (
            {"models": [{"model_id": "x"}, {"model_id": "y", "max_lora_rnk": 3}]},
            r"models\.1\.max_lora_rnk: .*did you mean 'max_lora_rank'",
        ),
        ({"model": {"model_id": "x"}, "models": [{"model_id": "y"}]}, "give one model, or a list of several"),
        ({}, "model: Field required"),
        ([], "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(values: object, message: str):
    with pytest.raises(InvalidRequest, match=message):
        parse_config(values)


def test_a_file_that_is_not_there_or_not_yaml_is_said_to_be(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="can't be read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(InvalidRequest, match="not YAML"):
        load_config(tmp_path / "bad.yaml")


def test_the_password_of_a_database_is_not_printed():
    url = "postgresql+psycopg://twinkle:s3:cret@db:5432/twinkle"
    config = parse_config({"model": {"model_id": "m"}, "storage": {"database_url": url}})
    assert "s3" not in describe(config).partition("database_url:")[2].partition("#")[0]
    assert "postgresql+psycopg://twinkle:***@db:5432/twinkle" in describe(config)


def test_every_setting_is_described_and_the_description_is_itself_a_configuration():
    import yaml

    config = parse_config({"model": {"model_id": "org/model"}})
    text = describe(config)
    assert parse_config(yaml.safe_load(text)) == config
    assert all("  # " in line and not line.endswith("# ") for line in text.splitlines())


def test_what_our_own_checks_say_is_said_as_it_is():
    with pytest.raises(InvalidRequest, match="config: server: tls_certificate and tls_key belong together"):
        parse_config({"model": {"model_id": "m"}, "server": {"tls_key": "key.pem"}})
