"""Large batches as several requests: cut before they are sent, put together when they come back.

Gradients add up in the adapter, so a cut changes nothing but how long others wait between the pieces.
"""

from collections.abc import Sequence

from twinkle.protocol.metrics import reduce_metric
from twinkle.protocol.types import Datum, ForwardBackwardOutput

# One request holds at most so many datums, and so many tokens (unless a single datum is longer).
MAX_DATUMS = 1024
MAX_TOKENS = 131_072


def split(data: Sequence[Datum]) -> list[list[Datum]]:
    """The datums in order, cut into requests. An empty batch is one empty request: the server says what it thinks."""
    chunks: list[list[Datum]] = [[]]
    tokens = 0
    for datum in data:
        length = datum.model_input.length
        if chunks[-1] and (len(chunks[-1]) == MAX_DATUMS or tokens + length > MAX_TOKENS):
            chunks.append([])
            tokens = 0
        chunks[-1].append(datum)
        tokens += length
    return chunks


def join(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The result of the whole batch; of metrics, those that all requests have, means weighted by datums."""
    if len(outputs) == 1:
        return outputs[0]
    names = set[str].intersection(*(set(output.metrics) for output in outputs))
    counts = [len(output.loss_fn_outputs) for output in outputs]
    return ForwardBackwardOutput(
        [datum for output in outputs for datum in output.loss_fn_outputs],
        {
            name: reduce_metric(name, [output.metrics[name] for output in outputs], counts)
            for name in sorted(names)
        },
        outputs[0].loss_fn_output_type,
    )
