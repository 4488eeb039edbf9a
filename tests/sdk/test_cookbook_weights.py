"""tinker-cookbook's `weights` (download, merge, adapters for serving) with checkpoints of this server.

The cookbook is installed beside this environment, without what it depends on: that is here, but for pyrage, which is
the extra `age` of the server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3MoeConfig

COOKBOOK = "tinker-cookbook==0.6.1"
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
EYES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 4,
}
TOKENS = [1, 5, 9, 200, 41]

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "TWINKLE_TEST_BASE_URL" in os.environ:
        pytest.skip("this is the process that runs under an older SDK")
    pytest.importorskip("pyrage", reason="needs twinkle-server[age]")
    target = tmp_path_factory.mktemp("cookbook")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*command, COOKBOOK], check=True, timeout=300)
    return target


def run(cookbook: Path, program: str, *arguments: object, **environment: str) -> Any:
    """What a program that uses the cookbook prints last, as JSON."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    path = os.pathsep.join([str(cookbook), *filter(None, [kept.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        env={**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


DOWNLOAD = """
import json
import sys
import tinker
from tinker import types
from tinker_cookbook import weights

model, output, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
made = tinker.ServiceClient().create_lora_training_client(model, rank=4)
client = made.result() if hasattr(made, "result") else made
inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
client.forward_backward([datum], "cross_entropy").result()
client.optim_step(types.AdamParams(learning_rate=0.05)).result()
path = client.save_state("for-the-cookbook").result().path
weights.download(tinker_path=path, output_dir=output)
[output] = client.forward([datum], "cross_entropy").result().loss_fn_outputs
print(json.dumps(output["logprobs"].tolist()))
"""


def test_a_training_checkpoint_is_downloaded(cookbook: Path, base_url: str, model_dir: Path, tmp_path: Path):
    from peft import PeftModel

    settings = {"TINKER_BASE_URL": base_url, "TINKER_API_KEY": "tml-cookbook", "TINKER_TELEMETRY": "0"}
    ours = run(cookbook, DOWNLOAD, "Qwen/Qwen3.5-4B", tmp_path / "adapter", json.dumps(TOKENS), **settings)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert ours == pytest.approx(logprobs(model), abs=1e-4)


def logprobs(model: Any) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS[:-1]])).logits[0]
    return torch.log_softmax(logits, -1)[torch.arange(len(TOKENS) - 1), TOKENS[1:]].tolist()


BUILD = """
import sys
from tinker_cookbook import weights

base, adapter, output = sys.argv[1:]
weights.build_hf_model(base_model=base, adapter_path=adapter, output_path=output, dtype="float32")
print("0")
"""


def published(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mixture of experts":
            config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        linear = {"layer_types": ["linear_attention", "full_attention"]}
        text = {**SIZES, **linear, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
        config = Qwen3_5Config(text_config=text, vision_config=EYES, tie_word_embeddings=False)
        return Qwen3_5ForConditionalGeneration._from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["mixture of experts", "more than a text model"])
def test_an_adapter_in_its_layout_is_merged(kind: str, cookbook: Path, model_dir: Path, tmp_path: Path):
    from twinkle.protocol.types import Datum, ModelInput
    from twinkle.server.config import parse_config
    from twinkle.server.local import ServiceClient

    base = published(kind)
    base.save_pretrained(tmp_path / "base")
    for path in model_dir.glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    model = {"model_id": str(tmp_path / "base"), "torch_dtype": "float32"}
    config = {"model": model, "ray": {"num_gpus": 0}, "storage": {"root": str(tmp_path / "storage")}}
    service = ServiceClient(parse_config(config))
    client = service.create_lora_training_client(str(tmp_path / "base"), rank=4)
    inputs = {"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)}
    datum = Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)
    client.forward_backward([datum])
    client.optim_step(learning_rate=0.05)
    ours = client.forward([datum], "cross_entropy").loss_fn_outputs[0]["logprobs"].to_numpy()
    rest = service.create_rest_client()
    adapter = rest.download_checkpoint(client.save_state("x").path, tmp_path / "adapter", layout="tinker")
    service.close()
    assert max(abs(ours - logprobs(base))) > 0.05
    run(cookbook, BUILD, tmp_path / "base", adapter, tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert list(ours) == pytest.approx(logprobs(merged), abs=1e-5)
