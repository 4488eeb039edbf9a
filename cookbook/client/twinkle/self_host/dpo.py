"""DPO: a model learns to prefer one kind of answer to another, from pairs (Rafailov et al. 2023, arXiv:2305.18290).

What it teaches: pairs of answers, a reference model's log-probabilities, a loss that is computed on this machine
(without torch) and whose gradient goes to the server. The chosen answers are those of swift/self-cognition, the
rejected ones what the base model says now.
Needs: a server that holds the base model; twinkle-client.
What to expect: the margin between chosen and rejected answers grows from 0, and the share of pairs with the chosen
answer ahead goes to 1. SimPO and ORPO (`--loss`) need no reference. Ctrl-C saves and says how to go on.

    python cookbook/client/twinkle/self_host/dpo.py
    python cookbook/client/twinkle/self_host/dpo.py --loss orpo
"""

import argparse
import os

from twinkle.dataloader import DataLoader
from twinkle.dataset import Dataset, DatasetMeta
from twinkle.loss import dpo_loss, orpo_loss, pair_data, simpo_loss
from twinkle.preprocessor import SelfCognitionProcessor
from twinkle.rollout import sample_groups, score
from twinkle.runs import Run
from twinkle.template import Template
from twinkle_client import ServiceClient, init_twinkle_client

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base-url", help="default: TWINKLE_BASE_URL, else http://localhost:8000")
parser.add_argument("--base-model", default="Qwen/Qwen3.5-4B")
parser.add_argument("--loss", default="dpo", choices=("dpo", "simpo", "orpo"))
parser.add_argument("--beta", type=float, default=0.1, help="of DPO")
parser.add_argument("--max-tokens", type=int, default=64, help="the longest rejected answer")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--learning-rate", type=float, default=5e-5)
parser.add_argument("--resume", metavar="DIR", help="folder of an interrupted run")
args = parser.parse_args()

init_twinkle_client(base_url=args.base_url, api_key=os.environ.get("API_KEY"))
service_client = ServiceClient()
template = Template(model_id=f"ms://{args.base_model}", chat_template_kwargs={"enable_thinking": False})

# Pairs: the data set's answer, and the base model's own to the same question.
chosen = Dataset(dataset_meta=DatasetMeta("ms://swift/self-cognition"))
chosen.filter(lambda row: row["tag"] == "en")
chosen.map(SelfCognitionProcessor("My Model", "My Team"))
conversations = [row["messages"] for row in chosen]
questions = [{"messages": messages[:-1]} for messages in conversations]
base = service_client.create_sampling_client(base_model=args.base_model)
answers = sample_groups(base, template, questions, 1, max_tokens=args.max_tokens, seed=0)
pairs = Dataset.from_rows(
    {"chosen": messages, "rejected": rollout.messages}
    for messages, [rollout] in zip(conversations, answers, strict=True)
)
pairs.set_template(template)
pairs.encode_pairs()
dataloader = DataLoader(dataset=pairs, batch_size=8)

loss = {"dpo": dpo_loss(beta=args.beta), "simpo": simpo_loss(), "orpo": orpo_loss()}[args.loss]

with Run(args.loss, resume=args.resume, config=vars(args)) as run:
    training_client = run.create_training_client(service_client, base_model=args.base_model, rank=16, seed=0)

    for _step, batch in run.steps(dataloader, training_client, epochs=args.epochs, save_every=50):
        sequences = [pair[side]["input_ids"] for pair in batch for side in ("chosen", "rejected")]
        data = pair_data(batch, score(base, sequences) if args.loss == "dpo" else None)
        passed = training_client.forward_backward_custom(data, loss)
        training_client.optim_step(learning_rate=args.learning_rate)
        run.log(
            loss=passed.metrics["loss:sum"],
            margin=passed.metrics["margin:mean"],
            accuracy=passed.metrics["accuracy:mean"],
        )

    saved = training_client.save_state(args.loss, overwrite=True)

print("saved", saved.path)
