"""Supervised training with the Tinker SDK: a model learns a new name, from the data set swift/self-cognition.

Start a server, then run this:

    twinkle-server launch --config server_config.yaml
    python self_cognition.py

It asks "Who are you?", trains for some passes over the data, printing the loss (nats a token) of each step, saves a
checkpoint, and asks again: a real model then says that it is My Model and was made by My Team. After that
`python sample.py twinkle://tinker-self-cognition` asks the checkpoint anything else.
"""

import argparse
import os

from tinker import ServiceClient, types

from twinkle import init_tinker_client
from twinkle.data_format import Message, Trajectory, to_datum
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.template import Template

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--base-url", help="default: TINKER_BASE_URL, TWINKLE_BASE_URL, else http://localhost:8000"
)
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--model-name", default="My Model")
parser.add_argument("--model-author", default="My Team")
parser.add_argument("--question", default="Who are you?")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--save-as", default="tinker-self-cognition")
args = parser.parse_args()

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=args.base_url, api_key=os.environ.get("API_KEY"))

template = Template(model_id=f"ms://{args.base_model}")
dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
dataset.set_template(template)
dataset.map(SelfCognitionProcessor(args.model_name, args.model_author))
dataset.encode()
dataloader = DataLoader(dataset=dataset, batch_size=8)


def ask(sampling_client):
    """The greedy answer to the question."""
    trajectory = Trajectory(messages=[Message(role="user", content=args.question)])
    input_ids = template.encode(trajectory, add_generation_prompt=True)["input_ids"]
    prompt = types.ModelInput.from_ints(input_ids.tolist())
    params = types.SamplingParams(max_tokens=64, temperature=0.0)
    [sequence] = sampling_client.sample(prompt, num_samples=1, sampling_params=params).result().sequences
    return template.decode(sequence.tokens, skip_special_tokens=True).strip()


before = ask(service_client.create_sampling_client(base_model=args.base_model).result())

training_client = service_client.create_lora_training_client(
    base_model=args.base_model, rank=16, seed=0
).result()
for epoch in range(args.epochs):
    for batch in dataloader:
        data = [to_datum(feature, types) for feature in batch]
        passed = training_client.forward_backward(data, "cross_entropy")
        stepped = training_client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
        learnt = sum(datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data)
        print(f"epoch {epoch + 1}: loss {passed.result().metrics['loss:sum'] / learnt:.3f}", flush=True)
        stepped.result()

path = training_client.save_state(args.save_as).result().path
print(f"saved {path}")

after = ask(service_client.create_sampling_client(model_path=path, base_model=args.base_model).result())
print(f"{args.question}\n  before: {before}\n  after:  {after}")
