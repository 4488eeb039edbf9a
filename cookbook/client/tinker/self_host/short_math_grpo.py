"""GRPO with the Tinker SDK: a model learns to answer additions rightly and shortly.

Each step asks some additions, samples a group of answers to each, grades them by `reward`, and makes those that are
better than the mean of their group likelier. Start a server, then run this:

    twinkle-server launch --config server_config.yaml
    python short_math_grpo.py

It prints the mean reward of each step, and the share of right answers before and after. What was measured:

- SmolLM2-135M-Instruct, 20 steps of 36 answers: the reward rises from 0.18 to 0.67. Most of that is form: it learns to
  answer by the number alone (7.6 tokens an answer become 3.0). Of 64 greedy answers 5 are right before, 9 after.
- The tests' model of random weights, 15 steps of 512 answers, nine different additions: the reward rises from 0.02 to
  0.7. It learns to write digits, to stop, and numbers near the right ones; and not to add.

The commands are in the README beside. Larger models than these were not measured.
"""

import argparse
import os
import random
import re

import numpy as np
from tinker import ServiceClient, types

from twinkle import init_tinker_client
from twinkle.data_format import Message, Trajectory
from twinkle.template import Template

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--base-url", help="default: TINKER_BASE_URL, TWINKLE_BASE_URL, else http://localhost:8000"
)
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument(
    "--loss", default="importance_sampling", choices=("importance_sampling", "ppo", "cispo", "gspo")
)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--prompts", type=int, default=16, help="additions asked in a step")
parser.add_argument("--group-size", type=int, default=8, help="answers sampled for each of them")
parser.add_argument("--question", default="What is {a} + {b}? Answer with the number only.")
parser.add_argument("--largest", type=int, default=99, help="the largest number that is added")
parser.add_argument("--max-tokens", type=int, default=16, help="the longest answer")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=1e-4, help="of the first step; it falls to 0")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

init_tinker_client()  # before the first client of the SDK is made
service_client = ServiceClient(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
template = Template(model_id=f"ms://{args.base_model}", chat_template_kwargs={"enable_thinking": False})


# ---------------------------------------------------------------- the task


def additions(count, numbers):
    return [(numbers.randint(0, args.largest), numbers.randint(0, args.largest)) for _ in range(count)]


def ask(a, b):
    """The question as tokens."""
    question = Message(role="user", content=args.question.format(a=a, b=b))
    return template.encode(Trajectory(messages=[question]), add_generation_prompt=True)["input_ids"].tolist()


def read(sequence):
    """The text of an answer, and the last number in it."""
    text = template.decode(sequence.tokens, skip_special_tokens=True).strip()
    found = re.findall(r"[0-9]+", text)
    return text, int(found[-1]) if found else None


def reward(sequence, truth):
    """From 0 to 1: 0.5 for the right number (at most 0.125 for one near it), up to 0.25 for being all digits, 0.25 for
    coming to an end.
    """
    text, number = read(sequence)
    near = 0.0 if number is None else 0.25 / (1 + abs(number - truth))
    digits = sum(character in "0123456789" for character in text) / max(1, len(text))
    return (0.5 if number == truth else near) + 0.25 * digits + 0.25 * (sequence.stop_reason == "stop")


# ---------------------------------------------------------------- sampling and training


def sample(sampling_client, prompts, num_samples, temperature, seed):
    """`num_samples` answers to each prompt. All prompts are sent before the first answer is waited for."""
    futures = [
        sampling_client.sample(
            types.ModelInput.from_ints(prompt),
            num_samples,
            types.SamplingParams(max_tokens=args.max_tokens, temperature=temperature, seed=seed + i),
        )
        for i, prompt in enumerate(prompts)
    ]
    return [future.result().sequences for future in futures]


def datum(prompt, sequence, advantage):
    """An answer as training data. Position t predicts token t + 1, and those of the prompt count 0."""
    tokens = prompt + sequence.tokens
    asked, answered = len(prompt) - 1, len(sequence.tokens)
    inputs = {
        "target_tokens": np.array(tokens[1:]),
        "logprobs": np.array([0.0] * asked + sequence.logprobs, np.float32),
        "advantages": np.array([0.0] * asked + [advantage] * answered, np.float32),
    }
    if args.loss == "gspo":  # the positions whose ratios make the one of the sequence
        inputs["sequence_ratio_mask"] = np.array([0.0] * asked + [1.0] * answered, np.float32)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in inputs.items()},
    )


def group_data(prompt, group, rewards):
    """The answers to one prompt, each with its advantage: how many standard deviations it is above the mean."""
    if rewards.std() == 0:  # all graded alike: nothing to learn from
        return []
    advantages = (rewards - rewards.mean()) / rewards.std()
    return [datum(prompt, sequence, advantage) for sequence, advantage in zip(group, advantages, strict=True)]


def accuracy(sampling_client):
    """The share of 64 additions whose greedy answer is right; the same ones at each call."""
    exam = additions(64, random.Random("exam"))
    groups = sample(sampling_client, [ask(a, b) for a, b in exam], num_samples=1, temperature=0.0, seed=0)
    return np.mean([read(answer)[1] == a + b for (a, b), [answer] in zip(exam, groups, strict=True)])


training_client = service_client.create_lora_training_client(
    base_model=args.base_model, rank=args.rank, seed=args.seed
).result()
sampling_client = training_client.save_weights_and_get_sampling_client().result()
before = accuracy(sampling_client)
numbers = random.Random(args.seed)

for step in range(args.steps):
    tasks = additions(args.prompts, numbers)
    prompts = [ask(a, b) for a, b in tasks]
    seed = args.seed + step * args.prompts
    groups = sample(sampling_client, prompts, args.group_size, temperature=1.0, seed=seed)
    rewards = np.array(
        [[reward(answer, a + b) for answer in group] for (a, b), group in zip(tasks, groups, strict=True)]
    )
    length = np.mean([len(answer.tokens) for group in groups for answer in group])
    print(f"step {step + 1}: reward {rewards.mean():.3f}, {length:.1f} tokens an answer", flush=True)

    data = [each for group in zip(prompts, groups, rewards, strict=True) for each in group_data(*group)]
    if data:
        training_client.forward_backward(data, args.loss)
        learning_rate = args.learning_rate * (1 - step / args.steps)
        training_client.optim_step(types.AdamParams(learning_rate=learning_rate))
    # The next answers come from the weights as they are now. It waits for its turn behind the step.
    sampling_client = training_client.save_weights_and_get_sampling_client().result()

print(f"right answers: {before:.0%} before, {accuracy(sampling_client):.0%} after")
