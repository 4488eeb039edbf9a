"""Supervised training: a model learns who it is, from the data set swift/self-cognition.

What it teaches: data to batches on the client, forward_backward and optim_step on the server, a run that can be
resumed.
Needs: a server that holds the base model; twinkle-client.
What to expect: the loss (nats a token) falls, and "Who are you?", asked before and after, is answered with the new
name. (The tiny model needs --epochs 6 --learning-rate 2e-3.) Ctrl-C saves and says how to resume.

    python cookbook/client/server/transformer/server.py          # in one terminal
    python cookbook/client/twinkle/self_host/self_cognition.py   # in another
"""

import argparse
import os
from functools import partial

from twinkle import schedule
from twinkle.data_format import Message, Trajectory
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.metric import nll
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.runs import Run
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client, types

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--model-name", default="My Model")
parser.add_argument("--model-author", default="My Team")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--save-as", default="my-lora-checkpoint")
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()

# Data: rows -> conversations -> tokens with labels -> batches. All of it on this machine.
template = Template(model_id=f"ms://{args.base_model}")
dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
dataset.set_template(template)
dataset.map(SelfCognitionProcessor(args.model_name, args.model_author))
dataset.encode()
dataloader = DataLoader(dataset=dataset, batch_size=8)
total_steps = args.epochs * len(dataloader)


def ask(sampling_client, question="Who are you?"):
    """The greedy answer."""
    conversation = Trajectory(messages=[Message(role="user", content=question)])
    prompt = template.encode(conversation, add_generation_prompt=True)["input_ids"]
    result = sampling_client.sample(
        prompt, sampling_params=types.SamplingParams(max_tokens=64, temperature=0)
    )
    return template.decode(result.sequences[0].tokens, skip_special_tokens=True).strip()


print("before:", ask(service_client.create_sampling_client(base_model=args.base_model)))

with Run("self-cognition", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(service_client, base_model=args.base_model, rank=16, seed=0)

    for step, batch in run.steps(dataloader, training_client, epochs=args.epochs, save_every=50):
        passed = training_client.forward_backward(batch, "cross_entropy")
        training_client.optim_step(learning_rate=schedule.linear(step, total_steps, args.learning_rate))
        run.log(loss=passed.then(partial(nll, data=batch)))

    saved = training_client.save_state(args.save_as, overwrite=True)

print("saved", saved.path)
print("after:", ask(service_client.create_sampling_client(model_path=saved.path)))
