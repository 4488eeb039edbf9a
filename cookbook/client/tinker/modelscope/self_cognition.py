"""Supervised training with the Tinker SDK at an endpoint that others host, such as ModelScope's: a model learns a new
name, from the data set swift/self-cognition. Where the endpoint is, the environment says:

    export MODELSCOPE_BASE_URL=https://...      # or TWINKLE_BASE_URL: where the endpoint is, as its host says
    export MODELSCOPE_API_KEY=...               # or MODELSCOPE_TOKEN: your key there
    export MODELSCOPE_BASE_MODEL=org/name       # a model that it offers
    python self_cognition.py

The endpoint has to speak the protocol of the Tinker SDK, as every Twinkle server does: with
MODELSCOPE_BASE_URL=http://localhost:8000 this runs against your own. Data and tokenizer come from ModelScope (`ms://`),
and the training data goes to the endpoint as tokens. It prints the loss (nats a token) of each step, saves a checkpoint
at the endpoint, and asks "Who are you?": a real model then says that it is My Model and was made by My Team.
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
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=1e-4)
args = parser.parse_args()

base_url = os.environ.get("MODELSCOPE_BASE_URL") or os.environ.get("TWINKLE_BASE_URL")
api_key = os.environ.get("MODELSCOPE_API_KEY") or os.environ.get("MODELSCOPE_TOKEN")
base_model = os.environ.get("MODELSCOPE_BASE_MODEL")
if not (base_url and base_model):
    raise SystemExit("Set MODELSCOPE_BASE_URL and MODELSCOPE_BASE_MODEL; --help says to what.")

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=base_url, api_key=api_key)

template = Template(model_id=f"ms://{base_model}")
dataset = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
dataset.set_template(template)
dataset.map(SelfCognitionProcessor("My Model", "My Team"))
dataset.encode()
dataloader = DataLoader(dataset=dataset, batch_size=8)

training_client = service_client.create_lora_training_client(base_model=base_model, rank=16, seed=0).result()
sent = []
for epoch in range(args.epochs):
    for batch in dataloader:
        # Nothing is waited for here: all the steps are sent, and a far server is never idle between two of them.
        data = [to_datum(feature, types) for feature in batch]
        passed = training_client.forward_backward(data, "cross_entropy")
        training_client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
        learnt = sum(datum.loss_fn_inputs["weights"].to_numpy().sum() for datum in data)
        sent.append((epoch + 1, passed, learnt))
for epoch, passed, learnt in sent:
    print(f"epoch {epoch}: loss {passed.result().metrics['loss:sum'] / learnt:.3f}", flush=True)

path = training_client.save_state("tinker-self-cognition").result().path
print(f"saved {path}")

sampling_client = service_client.create_sampling_client(model_path=path, base_model=base_model).result()
question = Trajectory(messages=[Message(role="user", content="Who are you?")])
input_feature = template.encode(question, add_generation_prompt=True)
prompt = types.ModelInput.from_ints(input_feature["input_ids"].tolist())
params = types.SamplingParams(max_tokens=64, temperature=0.0)
result = sampling_client.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
print(f"Who are you?\n    {template.decode(result.sequences[0].tokens, skip_special_tokens=True).strip()}")
