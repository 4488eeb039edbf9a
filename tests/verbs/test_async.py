"""The verbs from an event loop."""

import asyncio

from peft_reference import MODEL, random_batch

from twinkle.protocol.types import SamplingParams


async def test_an_event_loop_goes_on_while_the_server_works(verbs):
    service = verbs.connect("async")
    client = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    passed = await client.forward_backward(random_batch(1, (20, 30)))
    stepped = await client.optim_step(learning_rate=0.01)
    sampler = await client.save_weights_and_get_sampling_client_async()
    samples = await asyncio.gather(
        *(sampler.sample([i], 1, SamplingParams(max_tokens=4, stop=[])) for i in range(1, 5))
    )
    ticking.cancel()
    assert passed.metrics["loss:sum"] != 0 and stepped.metrics["grad_norm:mean"] > 0
    assert [len(sample.sequences[0].tokens) for sample in samples] == [4] * 4
    assert ticks > 10
    saved = await client.save_state("from-a-loop", overwrite=True)
    resumed = await service.create_training_client_from_state_async(saved.path, with_optimizer=True)
    assert (await resumed.forward(random_batch(1, (5,)))).metrics["loss:sum"] != 0
