"""Tokenizes conversations with a chat template and marks the tokens to train on.

Only the assistant's messages and the token that ends each of them contribute to the loss. The ids are exactly those of
``apply_chat_template(tokenize=True)``, so that the model is trained on the same tokens that it sees at generation time.

The loss mask is derived without knowledge of the template. An assistant turn is the text that the rendering of the
conversation up to and including the turn adds to the rendering of the preceding messages with a generation prompt. Text
after the last control token of the turn, usually a newline, is not trained on. Some templates render a turn differently
once others follow (Qwen3's removes the reasoning). They yield one example per assistant turn, rendered as it is when
that turn is generated.

An example begins with one beginning-of-sequence token if the tokenizer adds one. Those that a template writes before
later turns, as Llama 2's does, are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import date
from typing import Literal

from jinja2 import TemplateError

from pipeline.data.records import Conversation, single_turn
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

# For base models without a chat template. It consists of text and the end-of-sequence token, so it adds no new tokens.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

# The date for templates that print the current one, so that a dataset does not depend on the day on which it is built.
# It is the default of Llama 3.2's template.
TEMPLATE_DATE = date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<layout>.*?)(?P=quote)\s*\)""")

Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation, or its beginning, as token ids with a loss mask of the same length (1: trained on)."""

    input_ids: list[int]
    loss_mask: list[int]


def chat_template(tokenizer: TextTokenizer, name: Literal["model", "plain"]) -> str:
    """Returns the template for instruction tuning, which is also saved with the tuned model.

    Raises:
        UserError: ``name`` is ``model``, and the model's tokenizer has no template.
    """
    if name == "plain":
        return PLAIN_TEMPLATE if tokenizer.bos is None else "{{ bos_token }}" + PLAIN_TEMPLATE
    template = tokenizer.inner.chat_template
    if not template:
        raise UserError(
            setting="data.chat_template",
            value="model",
            rule="the model's tokenizer has no chat template, which instruction tuning needs",
            remedy="Set data.chat_template=plain for a plain-text template that needs no new tokens.",
        )
    # A tokenizer may have several, for example one for tool use.
    return str(template["default"] if isinstance(template, dict) else template)


def end_of_turn(tokenizer: TextTokenizer, template: str) -> int:
    """Returns the token that ends an answer, at which the tuned model should stop generating.

    Raises:
        UserError: the template cannot be trained on.
    """
    renderer = ChatTokenizer(tokenizer, template, max_length=2**20, dropped=Counter())
    examples = renderer.tokenize(single_turn("Hi.", "Hello."))
    if not examples:
        raise _unusable("it rejects a question with an answer")
    ids, mask = examples[0].input_ids, examples[0].loss_mask
    return [token for token, is_target in zip(ids, mask, strict=True) if is_target][-1]


class ChatTokenizer:
    """Tokenizes conversations with one template.

    Args:
        tokenizer: the model's tokenizer.
        template: a Jinja template, as in ``tokenizer.chat_template``.
        max_length: tokens per example. A longer conversation is cut after the last assistant turn that fits completely;
            if not even the first one does, it is dropped.
        dropped: counts conversations that are cut or dropped, by reason.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str, max_length: int, dropped: Counter[str]) -> None:
        self._tokenizer, self._max_length, self._dropped = tokenizer, max_length, dropped
        # The clock is the only input of a template that cannot be passed to it.
        self._template = CLOCK.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["layout"])), template)
        added_tokens = tokenizer.inner.added_tokens_decoder.items()
        control = {id_: token.content for id_, token in added_tokens if token.special}
        self._control_ids = frozenset(control) | {tokenizer.eos}
        self._control_texts = [*control.values(), tokenizer.inner.eos_token]

    def tokenize(self, conversation: Conversation) -> list[TokenizedConversation]:
        """Tokenizes a conversation.

        Returns:
            One example; one per assistant turn if the template rewrites earlier turns; or none if the conversation is
            dropped, which is counted.

        Raises:
            UserError: the template cannot be trained on, whatever the conversation.
        """
        # A control token in a message would end its turn early or start a fake one.
        if any(text in message["content"] for message in conversation for text in self._control_texts):
            return self._drop("control_token_in_text")
        answers = [message["content"] for message in conversation if message["role"] == "assistant"]
        if not any(answer.strip() for answer in answers):
            return self._drop("no_answer")
        if conversation[0]["role"] == "assistant":
            return self._drop("begins_with_the_assistant")
        try:
            texts = self._rendered_turns(conversation)
        except TemplateError:
            return self._drop("rejected_by_template")
        return [fitting for text, turns in texts for fitting in self._fit(self._tokenize(text, turns))]

    def _rendered_turns(self, conversation: Conversation) -> list[tuple[str, list[Span]]]:
        """Returns texts to train on, each with the spans of its assistant turns, which extend to the next turn."""
        turns = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
        complete = self._render(conversation, generation_prompt=False)
        prefixes = [self._render_up_to(conversation, turn) for turn in turns]
        if all(complete.startswith(text) for text, _ in prefixes):
            return [(complete, [span for _, span in prefixes])]
        # The template rewrites earlier turns, so each turn is trained on in the context it is generated in.
        return [(text, [span]) for text, span in prefixes]

    def _render_up_to(self, conversation: Conversation, turn: int) -> tuple[str, Span]:
        """Returns the text of the conversation up to and including an assistant turn, and the span of that turn."""
        before = self._render(conversation[:turn], generation_prompt=True)
        text = self._render(conversation[: turn + 1], generation_prompt=False)
        if not text.startswith(before):
            raise _unusable("its generation prompt differs from the beginning of an answer")
        return text, (len(before), len(text))

    def _render(self, messages: Conversation, generation_prompt: bool) -> str:
        text: str = self._tokenizer.inner.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
        )
        return text

    def _tokenize(self, text: str, turns: list[Span]) -> TokenizedConversation:
        encoded = self._tokenizer.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        mask = [0] * len(ids)
        for begin, end in turns:
            tokens = [index for index, (start, _) in enumerate(offsets) if begin <= start < end]
            # Train on the turn up to its last control token, which ends it. The model does not generate what follows.
            ends = [count for count, index in enumerate(tokens, 1) if ids[index] in self._control_ids]
            if not ends:
                raise _unusable(
                    "it ends an assistant turn without a control token, so the model would never learn to stop"
                )
            for index in tokens[: ends[-1]]:
                mask[index] = 1
        bos = self._tokenizer.bos
        if bos is not None and ids[0] != bos:
            ids, mask = [bos, *ids], [0, *mask]
        if bos is not None and ids[1] == bos:
            raise _unusable("it begins with two beginning-of-sequence tokens")
        return TokenizedConversation(ids, mask)

    def _fit(self, example: TokenizedConversation) -> list[TokenizedConversation]:
        ids, mask = example.input_ids, example.loss_mask
        if len(ids) <= self._max_length:
            return [example]
        # Lengths at which an assistant turn has just ended.
        ends = [length for length in range(1, self._max_length + 1) if mask[length - 1] and not mask[length]]
        if not ends:
            return self._drop("too_long")
        if any(mask[ends[-1] :]):  # otherwise only text after the last assistant turn is lost
            self._dropped["truncated"] += 1
        return [TokenizedConversation(ids[: ends[-1]], mask[: ends[-1]])]

    def _drop(self, reason: str) -> list[TokenizedConversation]:
        self._dropped[reason] += 1
        return []


def _unusable(reason: str) -> UserError:
    return UserError(
        setting="data.chat_template",
        value="model",
        rule=f"the model's chat template cannot be trained on, because {reason}",
        remedy="Set data.chat_template=plain for a plain-text template that needs no new tokens.",
    )
