"""GRPO: a model learns to add, from nothing but whether its answers are right.

What it teaches: groups of samples, a reward, advantages within the group (Shao et al. 2024, arXiv:2402.03300), a
policy gradient, and the new weights for sampling at each step.
Needs: a server that holds the base model; twinkle-client and 'twinkle-core[math]'.
What to expect: the mean reward, the share of right answers among the samples, rises; so does the share of right
greedy answers to sums that were asked before training. Ctrl-C saves and says how to go on.

    python cookbook/client/twinkle/self_host/grpo.py
    python cookbook/client/twinkle/self_host/grpo.py --loss ppo --largest 999
"""

import argparse
import os
import random

import numpy as np

from twinkle.advantage import grpo_advantages
from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset
from twinkle.metric import policy_metrics
from twinkle.reward import MathReward, grade_groups
from twinkle.rollout import sample_groups, to_training_data
from twinkle.runs import Run
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument(
    "--loss", default="importance_sampling", choices=("importance_sampling", "ppo", "cispo", "gspo")
)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--prompts", type=int, default=16, help="sums asked in a step")
parser.add_argument("--group-size", type=int, default=8, help="answers sampled to each of them")
parser.add_argument("--question", default="What is {a} + {b}? Answer with the number only.")
parser.add_argument("--largest", type=int, default=99, help="the largest number that is added")
parser.add_argument("--max-tokens", type=int, default=16, help="the longest answer")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
template = Template(model_id=f"ms://{args.base_model}", chat_template_kwargs={"enable_thinking": False})


def sums(count, seed):
    """Rows of a question and its answer."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(0, args.largest), numbers.randint(0, args.largest)) for _ in range(count)]
    return [
        {"messages": [{"role": "user", "content": args.question.format(a=a, b=b)}], "answer": str(a + b)}
        for a, b in pairs
    ]


reward = MathReward()
exam = sums(64, "exam")
dataloader = DataLoader(
    Dataset.from_rows(sums(args.steps * args.prompts, args.seed)), args.prompts, seed=args.seed
)


def accuracy(sampling_client):
    """The share of right greedy answers to the exam."""
    groups = sample_groups(sampling_client, template, exam, 1, max_tokens=args.max_tokens, temperature=0)
    return grade_groups(reward, [[rollout.completion for rollout in group] for group in groups], exam).mean()


with Run("grpo", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(
        service_client, base_model=args.base_model, rank=args.rank, seed=args.seed
    )
    before = accuracy(training_client.save_weights_and_get_sampling_client())

    for step, rows in run.steps(dataloader, training_client, epochs=1, save_every=10):
        # On-policy: the answers come from the weights as they are now.
        sampling_client = training_client.save_weights_and_get_sampling_client()
        seed = args.seed + step * args.prompts
        groups = sample_groups(
            sampling_client, template, rows, args.group_size, max_tokens=args.max_tokens, seed=seed
        )
        answers = [[rollout.completion for rollout in group] for group in groups]
        rewards = grade_groups(reward, answers, rows)
        data = to_training_data(groups, grpo_advantages(rewards), args.loss)
        if data:  # else all groups were of one mind, and there is nothing to learn
            passed = training_client.forward_backward(data, args.loss)
            training_client.optim_step(learning_rate=args.learning_rate)
            run.log(**policy_metrics(passed.result(), data))
        run.log(reward=rewards.mean(), tokens=np.mean([r.num_sampled for group in groups for r in group]))

    after = accuracy(training_client.save_weights_and_get_sampling_client())
    run.log(accuracy=after)
    saved = training_client.save_state("grpo", overwrite=True)

print("saved", saved.path)
print(f"right answers: {before:.0%} before, {after:.0%} after")
