"""A model that has a weight map here, read by that map and by Megatron-Bridge's, in the same processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from dataclasses import replace
from typing import Any

from twinkle.server.backends.protocol import ModelConfig

SECONDS = 200


def different_parameters(config: ModelConfig) -> list[str]:
    """Names of those that are not the same to the bit on some rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinkle_megatron.backend"])
    meeting = os.path.join(tempfile.mkdtemp(prefix="ranks-"), "meeting")
    answers: Any = context.Queue()
    ranks = [replace(config, rank=i, rendezvous=f"file://{meeting}") for i in range(config.num_ranks)]
    processes = [context.Process(target=_answer, args=(rank, answers), daemon=True) for rank in ranks]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=SECONDS) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for answer in found:
        if isinstance(answer, Exception):
            raise answer
    return [name for answer in found for name in answer]


def _answer(config: ModelConfig, answers: Any) -> None:
    try:
        answers.put(_different(config))
    except Exception as error:
        answers.put(error)


def _different(config: ModelConfig) -> list[str]:
    import torch

    from twinkle_megatron import architecture, bridge_weights, build, groups, weights

    torch.set_num_threads(1)
    hf = architecture.read_hf_config(config)
    own = architecture.describe(hf, config)
    architecture.FAMILIES = ()
    theirs = architecture.describe(hf, config)
    ranks = groups.join(config)
    one, other = build.build(own, ranks), build.build(theirs, ranks)
    weights.load(one, config.path, own, ranks)
    bridge_weights.load(other, config.path, theirs, ranks)
    found = dict(other.named_parameters())
    different = [
        name
        for name, value in one.named_parameters()
        if name not in found or not value.equal(found.pop(name))
    ]
    return [*different, *found]
