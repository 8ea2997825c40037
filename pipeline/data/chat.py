"""Conversations to token ids and a loss mask: loss on what the assistant says and on its end of turn, nothing else.

The ids are exactly what ``apply_chat_template(tokenize=True)`` gives, so that training sees what generation sees. The
mask is found without knowing the template: an assistant turn is what the rendering up to it, with generation prompt,
lacks of the rendering including it; of that, what follows the last control token (a newline, usually) is not taught.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from pipeline.data.conversations import Conversation, turn
from pipeline.data.tokens import TextTokenizer
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


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens; both lists have one element a token."""

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
    if rendered is None:
        raise _unusable("it refuses a question with its answer")
    return max(zip(rendered.loss_mask, range(len(rendered.loss_mask)), rendered.input_ids, strict=True))[2]


class ChatRenderer:
    """Renders conversations with one template.

    Args:
        longest: tokens. A longer conversation loses turns from its end until its last assistant turn fits whole;
            where not even the first does, it is dropped.
        dropped: counts conversations that were cut or dropped, by reason.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str, longest: int, dropped: Counter[str]) -> None:
        self._tokenizer, self._template, self._longest, self._dropped = tokenizer, template, longest, dropped
        control = {id_: token.content for id_, token in _added_tokens(tokenizer) if token.special}
        self._control_ids = frozenset(control) | {tokenizer.eos}
        self._control_texts = [*control.values(), tokenizer.inner.eos_token]

    def render(self, conversation: Conversation) -> Rendered | None:
        """Ids and mask, or None where the conversation is dropped; why is counted.

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
            text, spans = self._assistant_spans(conversation)
        except TemplateError:
            return self._drop("refused_by_template")
        return self._fit(self._tokenize(text, spans))

    def _assistant_spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and where in it each assistant turn lies, from its first character to the next turn."""
        text = self._render(conversation, generation_prompt=False)
        spans = []
        for number, message in enumerate(conversation):
            if message["role"] == "assistant":
                before = self._render(conversation[:number], generation_prompt=True)
                upto = self._render(conversation[: number + 1], generation_prompt=False)
                if not (text.startswith(upto) and upto.startswith(before)):
                    raise _unusable("it renders earlier turns differently once later ones follow")
                spans.append((len(before), len(upto)))
        return text, spans

    def _render(self, messages: Conversation, generation_prompt: bool) -> str:
        rendered: str = self._tokenizer.inner.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return rendered

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
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

    def _fit(self, rendered: Rendered) -> Rendered | None:
        if len(rendered.input_ids) <= self._longest:
            return rendered
        mask = rendered.loss_mask
        ends = [at for at in range(1, self._longest + 1) if mask[at - 1] and not mask[at]]
        if not ends:
            return self._drop("too_long")
        if any(mask[ends[-1] :]):  # else only what the template puts behind the last turn is lost
            self._dropped["cut_to_whole_turns"] += 1
        return Rendered(rendered.input_ids[: ends[-1]], rendered.loss_mask[: ends[-1]])

    def _drop(self, reason: str) -> Rendered | None:
        self._dropped[reason] += 1
        return None


def _added_tokens(tokenizer: TextTokenizer) -> list[tuple[int, Any]]:
    return list(tokenizer.inner.added_tokens_decoder.items())


def _unusable(why: str) -> UserError:
    return UserError(
        setting="data.chat_template",
        value="model",
        rule=f"the model's chat template cannot be trained on: {why}",
        remedy="Say data.chat_template=plain for a plain-text template that needs no new tokens.",
    )
