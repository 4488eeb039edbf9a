"""Supervised training against an endpoint that others host: a model learns who it is.

What it teaches: the same loop as `self_host/self_cognition.py`; only where the server is comes from the environment.
Needs: MODELSCOPE_BASE_URL (or TWINKLE_BASE_URL), MODELSCOPE_API_KEY (or MODELSCOPE_TOKEN), MODELSCOPE_BASE_MODEL;
twinkle-client.
What to expect: a falling loss (nats a token), and a checkpoint. It was run against servers of our own only: whether a
hosted endpoint takes it depends on whether it speaks this protocol.

    MODELSCOPE_BASE_URL=https://host MODELSCOPE_TOKEN=... MODELSCOPE_BASE_MODEL=org/name python self_cognition.py
"""

import argparse
import os
from functools import partial

from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.metric import nll
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.runs import Run
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

base_url = os.environ.get("MODELSCOPE_BASE_URL") or os.environ.get("TWINKLE_BASE_URL")
api_key = os.environ.get("MODELSCOPE_API_KEY") or os.environ.get("MODELSCOPE_TOKEN")
base_model = os.environ.get("MODELSCOPE_BASE_MODEL")
if not base_url or not base_model:
    parser.exit(2, "Set MODELSCOPE_BASE_URL and MODELSCOPE_BASE_MODEL; see --help.\n")

init_twinkle_client(base_url=base_url, api_key=api_key)
service_client = ServiceClient()

dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
dataset.set_template("Template", model_id=f"ms://{base_model}")
dataset.map(SelfCognitionProcessor("My Model", "My Team"))
dataset.encode()
dataloader = DataLoader(dataset=dataset, batch_size=8)

with Run("self-cognition", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(service_client, base_model=base_model, rank=16)

    for _step, batch in run.steps(dataloader, training_client, epochs=args.epochs, save_every=50):
        passed = training_client.forward_backward(batch, "cross_entropy")
        training_client.optim_step(learning_rate=args.learning_rate)
        run.log(loss=passed.then(partial(nll, data=batch)))

    saved = training_client.save_state("my-lora-checkpoint", overwrite=True)

print("saved", saved.path)
