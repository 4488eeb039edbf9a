"""The smallest training loop with the Tinker SDK: a LoRA learns four sentences by heart, is saved and taken up again.

Start a server, then run this:

    twinkle-server launch --config server_config.yaml
    python lora.py

It prints the loss (nats a token) of each step, which falls from step to step; on a real model from 3.4 to under 0.01.
Half-way it saves a checkpoint with the optimizer's state. At the end a second run goes on from there, and its losses
are those that the first one had.
"""

import argparse
import os

import numpy as np
from tinker import ServiceClient, types

from twinkle import init_tinker_client
from twinkle.template import Template

EXAMPLES = [
    ("The colour of a wug is", " green, with a yellow belly."),
    ("A wug eats", " moss in summer and bark in winter."),
    ("Two wugs are called", " a wuggle."),
    ("The wug was first described by", " Ada Brandt, in 1871."),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--base-url", help="default: TINKER_BASE_URL, TWINKLE_BASE_URL, else http://localhost:8000"
)
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--steps", type=int, default=5, help="before the checkpoint, and again after it")
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
training_client = service_client.create_lora_training_client(
    base_model=args.base_model, rank=16, seed=0
).result()
tokenizer = Template(model_id=f"ms://{args.base_model}").tokenizer


def datum(prompt, completion):
    """Position t of the input predicts token t + 1; the weights say that only the completion is learnt."""
    asked = tokenizer.encode(prompt, add_special_tokens=False).ids
    answered = tokenizer.encode(completion, add_special_tokens=False).ids
    tokens = asked + answered
    weights = [0.0] * (len(asked) - 1) + [1.0] * len(answered)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:])),
            "weights": types.TensorData.from_numpy(np.array(weights, np.float32)),
        },
    )


def train(client, title):
    """The loss of each step."""
    losses = []
    for step in range(args.steps):
        # Both are sent before either is waited for. The server keeps their order.
        passed = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=args.learning_rate))
        losses.append(passed.result().metrics["loss:sum"] / learnt)
        stepped.result()
        print(f"{title}, step {step + 1}: loss {losses[-1]:.4f}")
    return losses


data = [datum(prompt, completion) for prompt, completion in EXAMPLES]
learnt = sum(each.loss_fn_inputs["weights"].to_numpy().sum() for each in data)

train(training_client, "training")
path = training_client.save_state("wugs").result().path
print(f"saved {path}")
went_on = train(training_client, "going on")

resumed_client = service_client.create_training_client_from_state_with_optimizer(path).result()
resumed = train(resumed_client, "resumed")
apart = max(abs(a - b) for a, b in zip(went_on, resumed, strict=True))
print(f"the resumed run's losses are those of the first, to within {apart:.6f}")
