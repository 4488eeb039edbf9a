"""On-policy distillation: a student learns from what a teacher thinks of the student's own answers.

What it teaches: the student samples, the teacher scores every token (compute_logprobs), and the difference, less its
mean, is each token's advantage: the reverse KL divergence goes down (Agarwal et al. 2023, arXiv:2306.13649).
Needs: a server that holds the base model; twinkle-client; and a teacher: a checkpoint on the same base,
such as self_cognition.py saves.
What to expect: the divergence (nats a token, estimated from the samples) falls towards 0. Ctrl-C saves and says how
to go on.

    python cookbook/client/twinkle/self_host/distill_on_policy.py twinkle://my-lora-checkpoint
"""

import argparse
import os

import numpy as np

from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.distillation import teacher_log_ratios
from twinkle.rollout import sample_groups, score, to_training_data
from twinkle.runs import Run
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("teacher", help="checkpoint of the teacher: twinkle://NAME, or the full path")
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--prompts", type=int, default=8, help="questions asked in a step")
parser.add_argument("--group-size", type=int, default=4, help="answers sampled to each of them")
parser.add_argument("--max-tokens", type=int, default=48, help="the longest answer")
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=2e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
template = Template(model_id=f"ms://{args.base_model}", chat_template_kwargs={"enable_thinking": False})
teacher = service_client.create_sampling_client(model_path=args.teacher)

questions = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
questions.filter(lambda row: row["tag"] == "en")
questions.map(lambda row: {"messages": [{"role": "user", "content": row["query"]}]})
dataloader = DataLoader(dataset=questions, batch_size=args.prompts, seed=args.seed)

with Run("distill-on-policy", resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(
        service_client, base_model=args.base_model, rank=args.rank, seed=args.seed
    )

    for step, rows in run.steps(dataloader, training_client, epochs=args.epochs, save_every=20):
        student = training_client.save_weights_and_get_sampling_client()
        seed = args.seed + step * args.prompts
        groups = sample_groups(
            student, template, rows, args.group_size, max_tokens=args.max_tokens, seed=seed
        )
        rollouts = [rollout for group in groups for rollout in group]
        log_ratios = teacher_log_ratios(rollouts, score(teacher, [rollout.tokens for rollout in rollouts]))
        baseline = np.concatenate(log_ratios).mean()  # minus the divergence
        data = to_training_data(rollouts, [each - baseline for each in log_ratios])
        training_client.forward_backward(data, "importance_sampling")
        training_client.optim_step(learning_rate=args.learning_rate)
        run.log(kl=-baseline)

    saved = training_client.save_state("student", overwrite=True)

print("saved", saved.path)
