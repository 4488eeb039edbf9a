"""Sampling with the Tinker SDK, from a base model or from a checkpoint.

Start a server, then run this; a checkpoint is one that another script saved:

    twinkle-server launch --config server_config.yaml
    python sample.py
    python sample.py twinkle://tinker-self-cognition --question 'What is your name?'

It prints the greedy answer; some sampled ones, which are the same in every run since they are seeded; one cut off where
a stop text comes; and how likely the model finds each token of the question. A real model answers in sentences.
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
parser.add_argument(
    "--base-url", help="default: TINKER_BASE_URL, TWINKLE_BASE_URL, else http://localhost:8000"
)
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--question", default="Who are you?")
parser.add_argument("--max-tokens", type=int, default=128)
parser.add_argument("--temperature", type=float, default=0.7)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--stop", default=".", help="a text that ends the third kind of answer")
args = parser.parse_args()

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
sampling_client = service_client.create_sampling_client(
    model_path=args.model_path, base_model=args.base_model
).result()

template = Template(model_id=f"ms://{args.base_model}")
trajectory = Trajectory(messages=[Message(role="user", content=args.question)])
input_feature = template.encode(trajectory, add_generation_prompt=True)
prompt = types.ModelInput.from_ints(input_feature["input_ids"].tolist())


def show(title, sequence):
    """One answer; stop_reason is 'stop' where it came to its end, 'length' where max_tokens cut it off."""
    mean = sum(sequence.logprobs) / max(1, len(sequence.logprobs))
    print(
        f"{title}: {len(sequence.tokens)} tokens, {sequence.stop_reason}, mean logprob {mean:.3f}\n"
        f"    {template.decode(sequence.tokens, skip_special_tokens=True)!r}"
    )


# Temperature 0 takes the likeliest token each time.
greedy = types.SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
# The same seed gives the same answers; on a busy server in bfloat16 nearly always.
seeded = types.SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
# Without `stop` an answer ends with the model's own end token.
stopped = types.SamplingParams(max_tokens=args.max_tokens, temperature=0.0, stop=args.stop)

# All three are sent before the first is waited for: the server samples them together.
futures = [
    sampling_client.sample(prompt, num_samples=1, sampling_params=greedy, include_prompt_logprobs=True),
    sampling_client.sample(prompt, num_samples=3, sampling_params=seeded),
    sampling_client.sample(prompt, num_samples=1, sampling_params=stopped),
]
from_greedy, from_seeded, from_stopped = [future.result() for future in futures]

show("greedy", from_greedy.sequences[0])
for number, sequence in enumerate(from_seeded.sequences):
    show(f"sample {number + 1}", sequence)
show(f"up to {args.stop!r}", from_stopped.sequences[0])

print("logprobs of the prompt:")
for token, logprob in zip(prompt.to_ints(), from_greedy.prompt_logprobs or [], strict=True):
    print(f"    {template.decode([token])!r:16} " + ("(first)" if logprob is None else f"{logprob:.3f}"))
