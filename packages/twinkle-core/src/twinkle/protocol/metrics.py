"""How metrics are combined: datums to requests by the server, requests to batches by the client."""

from collections.abc import Sequence


def reduce_metric(name: str, values: Sequence[float], weights: Sequence[int] | None = None) -> float:
    """One value from those of several parts of a batch, by the suffix of the metric's name; the sum if it has none.

    Args:
        weights: of each value in a mean, its number of datums; default: 1.
    """
    match name.rpartition(":")[2]:
        case "mean":
            counts = [1] * len(values) if weights is None else weights
            total = sum(value * count for value, count in zip(values, counts, strict=True))
            return total / max(sum(counts), 1)  # an empty batch has no datums
        case "max":
            return max(values)
        case "min":
            return min(values)
        case _:
            return float(sum(values))
