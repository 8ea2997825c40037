"""Conversations to token ids and a loss mask: loss on what the assistant says and on its end of turn, nothing else.

The ids are exactly what ``apply_chat_template(tokenize=True)`` gives, so that training sees what generation sees. The
mask is found without knowing the template: an assistant turn is what the rendering up to it, with generation prompt,
lacks of the rendering including it; of that, what follows the last control token (a newline, usually) is not taught.
A template that writes a turn otherwise once later ones follow (Qwen3's takes the thinking out) gives one example a
turn, each as it is when that turn is generated.

One beginning-of-sequence token comes first where the tokenizer has one; what a template writes before later turns
(Llama 2's writes another) is its authors' choice.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from jinja2 import TemplateError

from pipeline.data.records import Conversation, turn
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

# For a base model without a chat template: words only, and the end-of-sequence token it has already.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


TODAY = date(2024, 7, 26)  # for templates that write it: the same data set on every day; Llama 3.2's own default
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<layout>.*?)(?P=quote)\s*\)""")

Spans = list[tuple[int, int]]  # of characters


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens; both lists have one element a token."""

    input_ids: list[int]
    loss_mask: list[int]  # 1 where the token is taught


def chat_template(tokenizer: TextTokenizer, name: Literal["model", "plain"]) -> str:
    """The template that a model is tuned with, and that the tuned model carries.

    Raises:
        UserError: ``model``, and it has none.
    """
    if name == "plain":
        return PLAIN_TEMPLATE if tokenizer.bos is None else "{{ bos_token }}" + PLAIN_TEMPLATE
    own = tokenizer.inner.chat_template
    if not own:
        raise UserError(
            setting="data.chat_template",
            value="model",
            rule="the model's tokenizer carries no chat template, and instruction tuning needs one",
            remedy="Say data.chat_template=plain for a plain-text template that needs no new tokens.",
        )
    return str(own["default"] if isinstance(own, dict) else own)


def end_of_turn(tokenizer: TextTokenizer, template: str) -> int:
    """The token that ends an answer, at which the tuned model is to stop.

    Raises:
        UserError: the template cannot be trained on.
    """
    rendered = ChatRenderer(tokenizer, template, longest=2**20, dropped=Counter()).render(turn("Hi.", "Hello."))
    if not rendered:
        raise _unusable("it refuses a question with its answer")
    mask, ids = rendered[0].loss_mask, rendered[0].input_ids
    return max(zip(mask, range(len(mask)), ids, strict=True))[2]


class ChatRenderer:
    """Renders conversations with one template.

    Args:
        longest: tokens. A longer conversation loses turns from its end until its last assistant turn fits whole;
            where not even the first does, it is dropped.
        dropped: counts conversations that were cut or dropped, by reason.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str, longest: int, dropped: Counter[str]) -> None:
        self._tokenizer, self._longest, self._dropped = tokenizer, longest, dropped
        self._template = _with_constant_date(template)
        control = {id_: token.content for id_, token in _added_tokens(tokenizer) if token.special}
        self._control_ids = frozenset(control) | {tokenizer.eos}
        self._control_texts = [*control.values(), tokenizer.inner.eos_token]

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Ids and masks of the whole, or of every turn where turns change; none where it is dropped, which is counted.

        Raises:
            UserError: the template cannot be used, whatever the conversation.
        """
        if any(text in message["content"] for message in conversation for text in self._control_texts):
            return self._drop("control_token_in_text")
        answers = [message["content"] for message in conversation if message["role"] == "assistant"]
        if not any(answer.strip() for answer in answers):
            return self._drop("no_answer")
        if conversation[0]["role"] == "assistant":
            return self._drop("begins_with_the_assistant")
        try:
            texts = self._texts(conversation)
        except TemplateError:
            return self._drop("refused_by_template")
        return [fitting for text, spans in texts for fitting in self._fit(self._tokenize(text, spans))]

    def _texts(self, conversation: Conversation) -> list[tuple[str, Spans]]:
        """What is written, and where in it each assistant turn lies, from its first character to the next turn."""
        turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        whole = self._render(conversation, generation_prompt=False)
        written = {turn: self._upto(conversation, turn) for turn in turns}
        if all(whole.startswith(text) for text, _ in written.values()):
            return [(whole, [span for _, span in written.values()])]
        return [(text, [span]) for text, span in written.values()]

    def _upto(self, conversation: Conversation, turn: int) -> tuple[str, tuple[int, int]]:
        """A conversation that ends with an assistant turn, and where that lies."""
        before = self._render(conversation[:turn], generation_prompt=True)
        upto = self._render(conversation[: turn + 1], generation_prompt=False)
        if not upto.startswith(before):
            raise _unusable("it writes an answer otherwise than it asks for one")
        return upto, (len(before), len(upto))

    def _render(self, messages: Conversation, generation_prompt: bool) -> str:
        rendered: str = self._tokenizer.inner.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return rendered

    def _tokenize(self, text: str, spans: Spans) -> Rendered:
        encoded = self._tokenizer.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        mask = [0] * len(ids)
        for begin, end in spans:
            inside = [at for at, (start, _) in enumerate(offsets) if begin <= start < end]
            for at in inside[: self._turn_length(ids, inside)]:
                mask[at] = 1
        bos = self._tokenizer.bos
        if bos is not None and ids[0] != bos:
            ids, mask = [bos, *ids], [0, *mask]
        if bos is not None and ids[1] == bos:
            raise _unusable("it begins with two beginning-of-sequence tokens")
        return Rendered(ids, mask)

    def _turn_length(self, ids: list[int], inside: list[int]) -> int:
        """How many of a turn's tokens are taught: up to its last control token, which ends it."""
        ends = [place for place, at in enumerate(inside, 1) if ids[at] in self._control_ids]
        if not ends:
            raise _unusable("it ends an assistant's turn with no control token, so the model would never learn to stop")
        return ends[-1]

    def _fit(self, rendered: Rendered) -> list[Rendered]:
        if len(rendered.input_ids) <= self._longest:
            return [rendered]
        mask = rendered.loss_mask
        ends = [at for at in range(1, self._longest + 1) if mask[at - 1] and not mask[at]]
        if not ends:
            return self._drop("too_long")
        if any(mask[ends[-1] :]):  # else only what the template puts behind the last turn is lost
            self._dropped["cut_to_whole_turns"] += 1
        return [Rendered(rendered.input_ids[: ends[-1]], rendered.loss_mask[: ends[-1]])]

    def _drop(self, reason: str) -> list[Rendered]:
        self._dropped[reason] += 1
        return []


def _with_constant_date(template: str) -> str:
    """The clock is the one thing that a template sees and that cannot be handed to it otherwise."""
    return CLOCK.sub(lambda call: repr(TODAY.strftime(call["layout"])), template)


def _added_tokens(tokenizer: TextTokenizer) -> list[tuple[int, Any]]:
    return list(tokenizer.inner.added_tokens_decoder.items())


def _unusable(why: str) -> UserError:
    return UserError(
        setting="data.chat_template",
        value="model",
        rule=f"the model's chat template cannot be trained on: {why}",
        remedy="Say data.chat_template=plain for a plain-text template that needs no new tokens.",
    )
