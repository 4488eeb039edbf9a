"""The template that datasets and sampling scripts use: trajectories in, tokens with labels out, and text back."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from twinkle import hub
from twinkle.data_format import NOT_TRAINED, InputFeature, Trajectory
from twinkle.protocol.errors import InvalidRequest
from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.files import TEMPLATE_FILES, read_chat_templates, read_special_tokens, read_tokenizer
from twinkle.template.labels import assistant_spans
from twinkle.template.rendering import ChatTemplate, Span

TrainOn: TypeAlias = Literal["assistant", "last_assistant", "all"]
TruncationStrategy: TypeAlias = Literal["raise", "left", "right", "delete"]


class SequenceTooLong(InvalidRequest):
    """A trajectory has more tokens than `max_length`."""


class Template:
    """A model's tokenizer and chat template.

    Args:
        model_id: whose; an id that `twinkle.hub.resolve` knows, or a folder. Only its tokenizer files are fetched.
        train_on: what labels mark. "assistant": each turn of the assistant, the token that ends it included;
            "last_assistant": only the last of these; "all": every token. Turns are taken as the chat template
            writes them: Qwen3's, for one, leaves out the thinking of all turns before the last question.
        max_length: most tokens of a sequence; None is no limit.
        truncation_strategy: what becomes of longer ones. "raise": an error; "left": the beginning is cut off;
            "right": the end is cut off; "delete": `batch_encode` and datasets leave the row out.
        chat_template: Jinja source to use in place of the model's.
        chat_template_kwargs: what the chat template knows beside messages and tools, such as
            `{"enable_thinking": False}`.
        revision: of the model on its hub.

    Raises:
        NotFound: if the model, or its tokenizer.json, can't be found.
        InvalidRequest: if an argument is not one of the above, or the model has no (valid) chat template.
    """

    def __init__(
        self,
        model_id: str | PathLike[str],
        *,
        train_on: TrainOn = "assistant",
        max_length: int | None = None,
        truncation_strategy: TruncationStrategy = "raise",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        _require_one_of("train_on", train_on, get_args(TrainOn))
        _require_one_of("truncation_strategy", truncation_strategy, get_args(TruncationStrategy))
        if max_length is not None and max_length < 1:
            raise InvalidRequest(
                f"max_length: {max_length}; allowed are whole numbers from 1, and None for no limit"
            )
        self.model_id = str(model_id)
        self.train_on = train_on
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        # A path object is a folder, even where its text would pass for an id.
        id = model_id if isinstance(model_id, str) else str(Path(model_id).absolute())
        folder = hub.resolve(id, "model", TEMPLATE_FILES, revision)
        sources = {"default": chat_template} if chat_template is not None else read_chat_templates(folder)
        variables = {**read_special_tokens(folder), **(chat_template_kwargs or {})}
        self.tokenizer: Tokenizer = read_tokenizer(folder)
        self._chat_template = ChatTemplate(sources, variables, owner=self.model_id)

    def render(self, trajectory: Trajectory | Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        """The conversation as the model's text.

        Raises:
            InvalidRequest: if it is no conversation, or the chat template refuses it.
        """
        return self._chat_template.render(read_conversation(trajectory), add_generation_prompt)

    def encode(
        self, trajectory: Trajectory | Mapping[str, Any], add_generation_prompt: bool = False
    ) -> InputFeature:
        """The conversation as tokens and labels.

        Args:
            add_generation_prompt: end with the opening of an assistant's turn, to sample what follows.

        Raises:
            InvalidRequest: if it is no conversation, or the chat template refuses it.
            SequenceTooLong: if it is longer than `max_length` and is not to be cut.
        """
        conversation = read_conversation(trajectory)
        text = self._chat_template.render(conversation, add_generation_prompt)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        input_ids = np.array(encoding.ids, dtype=np.int64)
        if self.train_on == "all":
            labels = input_ids.copy()
        else:
            spans = self._trained_spans(conversation, add_generation_prompt)
            labels = _labels(input_ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), spans)
        kept = self._kept(len(input_ids))
        return InputFeature(input_ids=input_ids[kept], labels=labels[kept])

    def batch_encode(
        self, trajectories: Iterable[Trajectory | Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[InputFeature]:
        """`encode` for each of them; with the strategy "delete" there are fewer features where some are too long."""
        features: list[InputFeature] = []
        for trajectory in trajectories:
            try:
                features.append(self.encode(trajectory, add_generation_prompt))
            except SequenceTooLong:
                if self.truncation_strategy != "delete":
                    raise
        return features

    def decode(
        self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]], skip_special_tokens: bool = False
    ) -> str:
        """The text of token ids, a list or an integer array [T]."""
        return self.tokenizer.decode(
            [int(token) for token in tokens], skip_special_tokens=skip_special_tokens
        )

    def _trained_spans(self, conversation: Conversation, add_generation_prompt: bool) -> list[Span]:
        """The stretches of the rendered text that are trained on: what the chat template marks, or the turns found."""
        marked = self._chat_template.generation_spans(conversation, add_generation_prompt)
        if marked is not None and self.train_on == "assistant":
            return marked
        turns = assistant_spans(self._chat_template, conversation, add_generation_prompt)
        if self.train_on == "assistant":
            return turns
        last = turns[-1:]
        if marked is None:
            return last
        return [span for span in marked for turn in last if span.start < turn.end and turn.start < span.end]

    def _kept(self, length: int) -> slice:
        """Which tokens of a sequence of that length stay."""
        if self.max_length is None or length <= self.max_length:
            return slice(None)
        if self.truncation_strategy == "left":
            return slice(length - self.max_length, None)
        if self.truncation_strategy == "right":
            return slice(self.max_length)
        raise SequenceTooLong(
            f"messages: {length} tokens, and max_length is {self.max_length}; raise it, or set truncation_strategy to "
            "'left' or 'right' to cut, or 'delete' to leave such rows out"
        )


def _labels(
    input_ids: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], spans: Sequence[Span]
) -> npt.NDArray[np.int64]:
    """Each token's own id where it shares a character with a span, else -100; int64 [T].

    Args:
        input_ids: int64 [T].
        offsets: each token's first character and the one after its last, int64 [T, 2].
    """
    labels = np.full_like(input_ids, NOT_TRAINED)
    for span in spans:
        inside = (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
        labels[inside] = input_ids[inside]
    return labels


def _require_one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidRequest(f"{field}: {value!r}; allowed are {', '.join(allowed)}")
