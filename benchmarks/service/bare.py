"""What the same work takes without a service, in one process: a training loop of one adapter, a padded `generate`, an
empty request to an empty server. Prints JSON.

    python -m service.bare train    --model DIR --sequences 32 --tokens 128
    python -m service.bare generate --model DIR --sequences 32 --prompt-tokens 32 --tokens 64
    python -m service.bare request

Plain Transformers, PEFT and uvicorn, on all cores, nothing else running.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="service.bare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, help in (("train", "training steps of one adapter"), ("generate", "a padded generate")):
        own = kinds.add_parser(kind, help=help)
        own.add_argument("--model", required=True, help="directory of the model")
        own.add_argument("--sequences", type=int, default=32)
        own.add_argument("--tokens", type=int, default=128 if kind == "train" else 64)
        own.add_argument("--repeats", type=int, default=10)
        own.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        if kind == "train":
            own.add_argument("--rank", type=int, default=8)
        else:
            own.add_argument("--prompt-tokens", type=int, default=32)
    kinds.add_parser("request", help="an empty request").add_argument("--repeats", type=int, default=300)
    arguments = vars(parser.parse_args())
    measure = {"train": train, "generate": generate, "request": request}[arguments.pop("kind")]
    print(json.dumps({"settings": arguments, **measure(**arguments)}, indent=2))


def train(model: str, sequences: int, tokens: int, repeats: int, threads: int, rank: int) -> dict[str, Any]:
    """LoRA on every linear layer and the output head, cross entropy, AdamW: what the service does by default."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.config.tie_word_embeddings = (
        False  # PEFT warns of an adapter on a tied head; the arithmetic is the same
    )
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    peft: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=32, target_modules=layers))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
    batch = torch.randint(0, 512, (sequences, tokens + 1))

    def step() -> None:
        logits = peft(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate(sequences * tokens, median_seconds(step, repeats))


def generate(
    model: str, sequences: int, tokens: int, repeats: int, threads: int, prompt_tokens: int
) -> dict[str, Any]:
    """One batch of the base model, all prompts of one length."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = torch.randint(0, 512, (sequences, prompt_tokens))
    mask = torch.ones_like(batch)

    def once() -> None:
        base.generate(
            batch, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True
        )

    return rate(sequences * tokens, median_seconds(once, repeats))


def request(repeats: int) -> dict[str, Any]:
    """A POST without a body, from one client over a connection that is kept."""
    import httpx
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        seconds = median_seconds(lambda: client.post("/"), repeats)
    server.should_exit = True
    thread.join()
    return {"request_ms": round(1000 * seconds, 3)}


def rate(tokens: int, seconds: float) -> dict[str, Any]:
    return {"tokens_per_second": round(tokens / seconds, 1), "milliseconds": round(1000 * seconds, 2)}


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """After two repeats that don't count."""
    seconds: list[float] = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
