"""A dataset that processes rows on access."""

from collections.abc import Callable
from typing import Self

from twinkle.dataset.encoding import EncodedRow, Encoder, encode_pair, encode_row
from twinkle.dataset.meta import DatasetMeta
from twinkle.dataset.readers import Row
from twinkle.dataset.rows import LocatedRow, Step, apply_step, require_template
from twinkle.dataset.sources import Sources
from twinkle.protocol.errors import InvalidRequest


class LazyDataset(Sources):
    """Rows from one or several sources, kept in memory as read, and mapped and encoded on access.

    Has the methods of `Dataset`, but `map` and `encode` return at once: they are applied each time a row is accessed,
    and errors, which name file and line, are raised then. Useful for a first look at large data, and for maps that
    differ each time. Since the length must be known, only `filter` (which processes every row at once) drops rows:
    `map` must not return None, and the strategy "delete" is refused.

    Args:
        dataset_meta: the source, or several; a string or path means `DatasetMeta(id)`.

    Raises:
        NotFound: if a source, or the requested files in it, can't be found.
        InvalidRequest: naming file and line, if a file can't be read; or if the argument is not a source.
    """

    def encode(self, add_generation_prompt: bool = False) -> Self:
        """Return each row with the `InputFeature` of its conversation; see `Dataset.encode`.

        Rows without a token to train on are not detected.

        Args:
            add_generation_prompt: end each sequence with the opening of an assistant turn, to sample from.

        Raises:
            InvalidRequest: if no template was set, or one that drops rows; or if there are no rows.
        """
        return self._encode("encode", encode_row, add_generation_prompt)

    def encode_pairs(self) -> Self:
        """Return each row with the features of its `chosen` and `rejected`; see `Dataset.encode_pairs`.

        Raises:
            InvalidRequest: as in `encode`.
        """
        return self._encode("encode_pairs", encode_pair, False)

    def _encode(
        self, method: str, encode_one: Callable[[Encoder, Row], EncodedRow], add_generation_prompt: bool
    ) -> Self:
        template = require_template(self._template, method)
        self._require_rows(method)
        if template.max_length is not None and template.truncation_strategy == "delete":
            raise InvalidRequest(
                f"{method}: truncation_strategy='delete' leaves rows out, which a lazy dataset would only notice when "
                "they are asked for; set 'left' or 'right' to cut, or use Dataset or IterableDataset"
            )
        encoder = Encoder(template, add_generation_prompt)
        return self._change(lambda row: encode_one(encoder, row).row, "Encoding", None)

    def _change(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        # Rows share their lists of steps, of which there are few.
        longer: dict[tuple[Step, ...], tuple[Step, ...]] = {}

        def change(item: LocatedRow) -> LocatedRow:
            return item._replace(steps=longer.setdefault(item.steps, (*item.steps, step)))

        self._apply(change, title, meta)
        return self

    def _select(self, step: Step, title: str, meta: DatasetMeta | None) -> Self:
        def change(item: LocatedRow) -> LocatedRow | None:
            return None if apply_step(step, self._row(item), item.where) is None else item

        self._apply(change, title, meta)
        return self

    def _row(self, item: LocatedRow) -> Row:
        row = item.row
        for step in item.steps:
            made = apply_step(step, row, item.where)
            if made is None:
                raise InvalidRequest(
                    f"{item.where}: map returned None, and a lazy dataset can't leave rows out while it is read; "
                    "filter() them out first, or use Dataset or IterableDataset"
                )
            row = made
        return row
