"""Off-policy distillation: a student learns a teacher's whole distribution over text that is there.

What it teaches: the teacher's likeliest tokens at each position (topk_prompt_logprobs) as targets of cross_entropy,
[T, K] of them instead of one a position (Hinton et al. 2015, arXiv:1503.02531).
Needs: a server that holds the base model; twinkle-client; and a teacher: a checkpoint on the same base,
such as self_cognition.py saves.
What to expect: the cross entropy (nats a token) falls towards the teacher's own entropy, and so does the divergence,
which is what is above it, towards 0.

    python cookbook/client/twinkle/self_host/distill_off_policy.py twinkle://my-lora-checkpoint
"""

import argparse
import os

import numpy as np

from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.distillation import teacher_data
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.runs import Run
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("teacher", help="checkpoint of the teacher: twinkle://NAME, or the full path")
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--k", type=int, default=16, help="tokens of the teacher at each position")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
teacher = service_client.create_sampling_client(model_path=args.teacher)

dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
dataset.set_template("Template", model_id=f"ms://{args.base_model}")
dataset.map(SelfCognitionProcessor("My Model", "My Team"))
dataset.encode()
dataloader = DataLoader(dataset=dataset, batch_size=8)

with Run("distill-off-policy", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(
        service_client, base_model=args.base_model, rank=args.rank, seed=0
    )

    for _step, batch in run.steps(dataloader, training_client, epochs=args.epochs, save_every=50):
        data = teacher_data(teacher, batch, args.k)
        passed = training_client.forward_backward(data, "cross_entropy")
        training_client.optim_step(learning_rate=args.learning_rate)
        weights = np.concatenate([datum.loss_fn_inputs["weights"].array for datum in data])
        weights = weights[weights.any(axis=1)]  # the positions that are trained on, each with a sum of 1
        loss = passed.metrics["loss:sum"] / len(weights)
        teachers_entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum() / len(weights)
        run.log(loss=loss, kl=loss - teachers_entropy)

    saved = training_client.save_state("student-off-policy", overwrite=True)

print("saved", saved.path)
