"""Sampling: questions to a base model, or to a checkpoint on it.

What it teaches: prompts by the model's own template, parameters, seeds, many samples at once, log-probabilities.
Needs: a server that holds the base model; twinkle-client; a checkpoint, as self_cognition.py saves one.
What to expect: one greedy answer, then three that are drawn; the same ones in every run with the same seed.

    python cookbook/client/twinkle/self_host/sample.py twinkle://my-lora-checkpoint
    python cookbook/client/twinkle/self_host/sample.py --question "Why is the sky blue?"       # the base model
"""

import argparse
import os

import numpy as np

from twinkle.data_format import Message, Trajectory
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client, types

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "checkpoint", nargs="?", help="twinkle://NAME, or the full path; the base model if left out"
)
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--system", default="You are a helpful assistant")
parser.add_argument("--question", default="Who are you?")
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--temperature", type=float, default=0.7)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
sampling_client = service_client.create_sampling_client(
    model_path=args.checkpoint, base_model=args.base_model
)

template = Template(model_id=f"ms://{args.base_model}")
messages = [Message(role="user", content=args.question)]
if args.system:
    messages.insert(0, Message(role="system", content=args.system))
trajectory = Trajectory(messages=messages)
input_feature = template.encode(trajectory, add_generation_prompt=True)
prompt = types.ModelInput.from_ints(input_feature["input_ids"].tolist())

# Both requests are sent before the first is waited for: the server generates them together.
greedy = sampling_client.sample(
    prompt=prompt, sampling_params=types.SamplingParams(max_tokens=args.max_tokens, temperature=0)
)
drawn = sampling_client.sample(
    prompt=prompt,
    num_samples=3,
    sampling_params=types.SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=0.95, seed=args.seed
    ),
)
titles = ["greedy", *(f"sample {number}" for number in (1, 2, 3))]
for title, sequence in zip(titles, [*greedy.sequences, *drawn.sequences], strict=True):
    text = template.decode(sequence.tokens, skip_special_tokens=True).strip()
    print(f"{title}: {len(sequence.tokens)} tokens, {sequence.stop_reason}, ", end="")
    print(f"mean logprob {np.mean(sequence.logprobs):.3f}\n    {text}")
