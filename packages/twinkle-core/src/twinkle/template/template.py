"""The template that datasets and sampling scripts use: from trajectories to tokens with labels, and back."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from twinkle import hub
from twinkle._version import __version__
from twinkle.data_format import InputFeature, Trajectory
from twinkle.protocol.errors import InvalidRequest
from twinkle.template.continuation import continuation_ids
from twinkle.template.conversation import Conversation, read_conversation
from twinkle.template.fitting import fitted
from twinkle.template.habits import Habits
from twinkle.template.labels import render_turns
from twinkle.template.parsing import ParsedTurn, parse_turn
from twinkle.template.rendering import ChatTemplate
from twinkle.template.shown import ShownMessages
from twinkle.template.token_labels import MarkedText, TokenLabels
from twinkle.template.tokenizer_files import (
    TEMPLATE_FILES,
    read_chat_templates,
    read_special_tokens,
    read_tokenizer,
)
from twinkle.template.turn_forms import TurnForm
from twinkle.template.turn_learning import learn_turn_form

TrainOn: TypeAlias = Literal["assistant", "last_assistant", "all"]
TruncationStrategy: TypeAlias = Literal["raise", "left", "right", "delete"]


class SequenceTooLong(InvalidRequest):
    """A trajectory has more tokens than `max_length`."""


class Template:
    """A model's tokenizer and chat template.

    Args:
        model_id: an id for `twinkle.hub.resolve`, or a folder. Only the tokenizer files are downloaded.
        train_on: what to label. "assistant": each assistant turn, including the token that ends it; "last_assistant":
            only the last of these; "all": every token. Turns are labelled as the chat template writes them: Qwen3's,
            for example, drops the thinking of all turns before the last question. A message with `weight: 0`, or
            `loss`, `train` or `trainable: false`, is not trained on.
        max_length: most tokens of a sequence; default: no limit.
        truncation_strategy: for longer sequences. "raise": an error; "left": cut off the beginning; "right": cut off
            the end; "delete": `batch_encode` and datasets drop the row.
        chat_template: Jinja source to use instead of the model's.
        chat_template_kwargs: further variables for the chat template, such as `{"enable_thinking": False}`.
        revision: of the model on its hub.

    Raises:
        NotFound: if the model, or its tokenizer.json, can't be found.
        InvalidRequest: if an argument is invalid, or the model has no (valid) chat template.
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
        # A path object is a folder, even if its text could be an id.
        id = model_id if isinstance(model_id, str) else str(Path(model_id).absolute())
        folder = hub.resolve(id, "model", TEMPLATE_FILES, revision)
        sources = {"default": chat_template} if chat_template is not None else read_chat_templates(folder)
        special_tokens = read_special_tokens(folder)
        variables = {**special_tokens, **(chat_template_kwargs or {})}
        self.tokenizer: Tokenizer = read_tokenizer(folder)
        self._eos_token = special_tokens.get("eos_token", "")
        self._chat_template = ChatTemplate(sources, variables, owner=self.model_id)
        self._habits = Habits(self._chat_template)
        self._shown = ShownMessages(self._chat_template)
        self._labels_of_tokens: TokenLabels | None = None

    def render(self, trajectory: Trajectory | Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        """The conversation as text for the model.

        Raises:
            InvalidRequest: if it is no conversation, or the chat template refuses it or would leave a message out.
        """
        return self._chat_template.render(self._read(trajectory), add_generation_prompt)

    def encode(
        self, trajectory: Trajectory | Mapping[str, Any], add_generation_prompt: bool = False
    ) -> InputFeature:
        """The conversation as tokens and labels.

        Args:
            add_generation_prompt: end with the opening of an assistant turn, to sample from.

        Raises:
            InvalidRequest: if it is no conversation, or the chat template refuses it or would leave a message out.
            SequenceTooLong: if it is longer than `max_length` and must not be cut.
        """
        return self.cut(self._token_labels.one(self.mark(trajectory, add_generation_prompt)))

    def mark(
        self, trajectory: Trajectory | Mapping[str, Any], add_generation_prompt: bool = False
    ) -> MarkedText:
        """The conversation as text, and what of it is trained on: the first half of `encode`.

        Raises:
            InvalidRequest: as `encode`.
        """
        conversation = self._read(trajectory)
        if self.train_on == "all":
            return self._marked_but_left_out(conversation, add_generation_prompt)
        return self._marked_turns(conversation, add_generation_prompt)

    def tokenize(self, texts: Sequence[MarkedText]) -> list[InputFeature]:
        """Tokens and labels of several texts, faster than one by one; uncut, whatever `max_length` is."""
        return self._token_labels.several(texts)

    def cut(self, feature: InputFeature) -> InputFeature:
        """The feature within `max_length`.

        Raises:
            SequenceTooLong: as `encode`.
        """
        kept = self._kept(len(feature["input_ids"]))
        return InputFeature(input_ids=feature["input_ids"][kept], labels=feature["labels"][kept])

    def batch_encode(
        self, trajectories: Iterable[Trajectory | Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> list[InputFeature]:
        """`encode` each trajectory; the strategy "delete" drops those that are too long."""
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
        """The text of token ids, given as a list or an integer array [T]."""
        return self.tokenizer.decode(
            [int(token) for token in tokens], skip_special_tokens=skip_special_tokens
        )

    def parse(
        self,
        tokens_or_text: str | Sequence[int] | npt.NDArray[np.integer[Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> ParsedTurn:
        """Parse one sampled turn into a message.

        The format of reasoning and calls is inferred from the model's chat template; whatever that doesn't cover is
        content.

        Args:
            tokens_or_text: what was sampled after a generation prompt: token ids (a list or an integer array [T]), or
                their text, special tokens included.
            tools: JSON schemas of the functions. Optional: they only say which arguments are text in formats that write
                all of them as text.

        Returns:
            The message, and the problems of calls that could not be read, which stay in the content. No text is an
            error.
        """
        text = tokens_or_text if isinstance(tokens_or_text, str) else self.decode(tokens_or_text)
        return parse_turn(text, self._turn_form, tools)

    def continuation(
        self,
        trajectory: Trajectory | Mapping[str, Any],
        turn_index: int,
        sampled: Sequence[int] | npt.NDArray[np.integer[Any]],
    ) -> npt.NDArray[np.int64]:
        """The tokens to append to a sampled turn: the messages that follow, and the opening of the model's next turn.

        Sampled tokens are kept rather than tokenised again. If the turn is what the chat template would have written,
        prompt, `sampled` and these tokens together equal `encode(trajectory, add_generation_prompt=True)`; if the
        template would write it differently (Qwen3's drops the thinking once there is another question), the sampled
        tokens stay. The turn's end comes first unless `sampled` ends with it. `max_length` is ignored.

        Args:
            trajectory: the conversation, including the turn as a message (`parse(sampled).message`) and the tool
                results or other messages that follow it.
            turn_index: index of that message.
            sampled: the turn's token ids, a list or an integer array [T].

        Returns:
            Token ids, int64 [N].

        Raises:
            InvalidRequest: if message `turn_index` is not the assistant's, or the chat template refuses the
                conversation.
        """
        conversation = self._read(trajectory)
        tokens = [int(token) for token in sampled]
        ids = continuation_ids(
            self._chat_template, self.tokenizer, self._turn_form, conversation, turn_index, tokens
        )
        return np.array(ids, dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that `encode` depends on; a subclass that encodes differently must change it.

        A chat template that uses the date has a different fingerprint each day.
        """
        sources = self._chat_template.sources
        asks_for_date = any("strftime_now" in source for source in sources.values())
        parts = [
            __version__,
            self.tokenizer.to_str(),
            sorted(sources.items()),
            self._chat_template.variables,
            self.train_on,
            self.max_length,
            self.truncation_strategy,
            date.today().isoformat() if asks_for_date else None,
        ]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def _read(self, trajectory: Trajectory | Mapping[str, Any]) -> Conversation:
        """The conversation in the forms that the chat template wants; raises if the template would drop a message."""
        conversation = fitted(read_conversation(trajectory), self._habits)
        self._shown.check(conversation)
        return conversation

    @cached_property
    def _turn_form(self) -> TurnForm:
        """How the model writes a turn; inferred on first use."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        return learn_turn_form(self._chat_template, [*special, self._eos_token])

    @property
    def _token_labels(self) -> TokenLabels:
        # The tokenizer may be exchanged for another.
        if self._labels_of_tokens is None or self._labels_of_tokens.tokenizer is not self.tokenizer:
            self._labels_of_tokens = TokenLabels(self.tokenizer)
        return self._labels_of_tokens

    def _marked_turns(self, conversation: Conversation, add_generation_prompt: bool) -> MarkedText:
        """With the spans to train on: those that the chat template marks, or the turns found."""
        marked = self._chat_template.generation_spans(conversation, add_generation_prompt)
        if marked is not None and self.train_on == "assistant" and not conversation.left_out:
            return MarkedText(*marked)
        text, turns = render_turns(self._chat_template, conversation, add_generation_prompt)
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        trained = [span for turn in turns if turn.message not in conversation.left_out for span in turn.spans]
        if marked is None:
            return MarkedText(text, trained)
        spans = [
            span for span in marked[1] for turn in trained if span.start < turn.end and turn.start < span.end
        ]
        return MarkedText(text, spans)

    def _marked_but_left_out(self, conversation: Conversation, add_generation_prompt: bool) -> MarkedText:
        """With the spans of messages excluded from training, when everything else is trained on."""
        if not conversation.left_out:
            text = self._chat_template.render(conversation, add_generation_prompt)
            return MarkedText(text, [], trains_spans=False)
        text, turns = render_turns(self._chat_template, conversation, add_generation_prompt)
        others = conversation.left_out - {turn.message for turn in turns}
        if others:
            raise InvalidRequest(
                f"messages[{min(others)}]: marked as not to be trained on, and train_on='all' trains every message "
                "that is not the assistant's; take the mark out, or train on 'assistant'"
            )
        spans = [span for turn in turns if turn.message in conversation.left_out for span in turn.spans]
        return MarkedText(text, spans, trains_spans=False)

    def _kept(self, length: int) -> slice:
        """The slice of a sequence of that length that is kept."""
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


def _require_one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InvalidRequest(f"{field}: {value!r}; allowed are {', '.join(allowed)}")
