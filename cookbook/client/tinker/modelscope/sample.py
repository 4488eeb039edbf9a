"""Sampling with the Tinker SDK at an endpoint that others host, such as ModelScope's; it is told by the environment.

    export MODELSCOPE_BASE_URL=https://...      # or TWINKLE_BASE_URL: where the endpoint is, as its host says
    export MODELSCOPE_API_KEY=...               # or MODELSCOPE_TOKEN: your key there
    export MODELSCOPE_BASE_MODEL=org/name       # a model that it offers
    python sample.py                            # or: python sample.py twinkle://..., a checkpoint of yours there

The endpoint has to speak the protocol of the Tinker SDK, as every Twinkle server does: with
MODELSCOPE_BASE_URL=http://localhost:8000 this runs against your own. The tokenizer comes from ModelScope (`ms://`). A
real model answers the question in a sentence or two.
"""

import argparse
import os

from tinker import ServiceClient, types

from twinkle import init_tinker_client
from twinkle.data_format import Message, Trajectory
from twinkle.template import Template

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "model_path", nargs="?", help="a checkpoint, twinkle://...; without one it is the base model"
)
parser.add_argument("--question", default="Who are you?")
parser.add_argument("--max-tokens", type=int, default=128)
args = parser.parse_args()

base_url = os.environ.get("MODELSCOPE_BASE_URL") or os.environ.get("TWINKLE_BASE_URL")
api_key = os.environ.get("MODELSCOPE_API_KEY") or os.environ.get("MODELSCOPE_TOKEN")
base_model = os.environ.get("MODELSCOPE_BASE_MODEL")
if not (base_url and base_model):
    raise SystemExit("Set MODELSCOPE_BASE_URL and MODELSCOPE_BASE_MODEL; --help says to what.")

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=base_url, api_key=api_key)

template = Template(model_id=f"ms://{base_model}")
trajectory = Trajectory(
    messages=[
        Message(role="system", content="You are a helpful assistant"),
        Message(role="user", content=args.question),
    ]
)
input_feature = template.encode(trajectory, add_generation_prompt=True)
prompt = types.ModelInput.from_ints(input_feature["input_ids"].tolist())
params = types.SamplingParams(max_tokens=args.max_tokens, temperature=0.7, seed=0)

sampling_client = service_client.create_sampling_client(
    model_path=args.model_path, base_model=base_model
).result()
result = sampling_client.sample(prompt=prompt, num_samples=2, sampling_params=params).result()
for sequence in result.sequences:
    print(f"{len(sequence.tokens)} tokens, {sequence.stop_reason}")
    print(f"    {template.decode(sequence.tokens, skip_special_tokens=True)!r}")
