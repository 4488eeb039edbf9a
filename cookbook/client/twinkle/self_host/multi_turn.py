"""RL over several turns: a model learns to use a tool.

What it teaches: rollouts in which the model calls a Python function and reads what it returns, token by token as they
were sampled; one advantage for all that the model said in a rollout.
Needs: a server that holds the base model, whose chat template knows tools; twinkle-client.
What to expect: the share of rollouts that call the tool rightly and give its result rises. A conversation of the
trained model is printed. Ctrl-C saves and says how to go on.

    python cookbook/client/twinkle/self_host/multi_turn.py
"""

import argparse
import os
import random
import re

import numpy as np

from twinkle.advantage import rloo_advantages
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset
from twinkle.rollout import sample_turns, to_training_data
from twinkle.runs import Run
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--prompts", type=int, default=8, help="questions asked in a step")
parser.add_argument("--group-size", type=int, default=8, help="rollouts of each of them")
parser.add_argument("--smallest", type=int, default=1000, help="the smallest number in a question")
parser.add_argument("--largest", type=int, default=99999)
parser.add_argument("--max-tokens", type=int, default=64, help="the longest turn")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
template = Template(model_id=f"ms://{args.base_model}", chat_template_kwargs={"enable_thinking": False})


def add(a: int, b: int) -> int:
    """The sum of two whole numbers."""
    return a + b


def question(numbers):
    a, b = (numbers.randint(args.smallest, args.largest) for _ in range(2))
    return {"messages": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": a + b}


def reward(rollout, row):
    """0.5 for a call that returned the right sum, 0.5 for saying it at last."""
    results = [message["content"] for message in rollout.messages if message["role"] == "tool"]
    said = re.findall(r"\d+", rollout.completion.replace(",", "")) if rollout.num_turns > 1 else []
    return 0.5 * (str(row["answer"]) in results) + 0.5 * (said[-1:] == [str(row["answer"])])


numbers = random.Random(args.seed)
rows = [question(numbers) for _ in range(args.steps * args.prompts)]
dataloader = DataLoader(Dataset.from_rows(rows), args.prompts, seed=args.seed)

with Run("multi-turn", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(
        service_client, base_model=args.base_model, rank=args.rank, seed=args.seed
    )

    for step, batch in run.steps(dataloader, training_client, epochs=1, save_every=10):
        groups = sample_turns(
            training_client.save_weights_and_get_sampling_client(),
            template,
            batch,
            args.group_size,
            tools=[add],
            max_turns=3,
            max_tokens=args.max_tokens,
            seed=args.seed + 1_000_000 * step,
        )
        rewards = np.array(
            [[reward(rollout, row) for rollout in group] for group, row in zip(groups, batch, strict=True)]
        )
        data = to_training_data(groups, rloo_advantages(rewards), "importance_sampling")
        if data:
            training_client.forward_backward(data, "importance_sampling")
            training_client.optim_step(learning_rate=args.learning_rate)
        turns = np.mean([rollout.num_turns for group in groups for rollout in group])
        run.log(reward=rewards.mean(), turns=turns)

    saved = training_client.save_state("multi-turn", overwrite=True)

print("saved", saved.path)
trained = service_client.create_sampling_client(model_path=saved.path)
[[rollout]] = sample_turns(
    trained, template, rows[:1], 1, tools=[add], max_turns=3, max_tokens=args.max_tokens, temperature=0
)
for message in rollout.messages:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    print(f"{message['role']}: {message.get('content')}", *calls)
