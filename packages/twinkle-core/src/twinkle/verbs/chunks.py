"""Splits large batches into several requests, and joins their results.

Gradients accumulate in the adapter, so splitting changes only how long other runs wait.
"""

from collections.abc import Sequence

from twinkle.protocol.metrics import reduce_metric
from twinkle.protocol.types import Datum, ForwardBackwardOutput

# Most datums and tokens of one request (a single datum may be longer).
MAX_DATUMS = 1024
MAX_TOKENS = 131_072


def split(data: Sequence[Datum]) -> list[list[Datum]]:
    """The datums of each request, in order. An empty batch is one empty request, which the server refuses."""
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
    """The result of the whole batch, with the metrics that all requests have; means are weighted by datums."""
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
