"""Tokenizes conversations with a chat template and marks the tokens to train on.

Only the assistant's messages and the token that ends each of them contribute to the loss. The ids are those of
``apply_chat_template(tokenize=True)`` with the template that the tuned model is saved with, so that the model is
trained on the same tokens that it sees at generation time.

The loss mask is derived without knowledge of the template. An assistant turn is the text that the rendering of the
conversation up to and including the turn adds to the rendering of the preceding messages with a generation prompt. Text
after the last control token of the turn, usually a newline, is not trained on. Some templates render a turn differently
once others follow (Qwen3's removes the reasoning). They yield one example per assistant turn, rendered as it is when
that turn is generated.

Templates run in a process of their own (``chat_worker.py``), one for all conversations of a dataset. A conversation
whose rendering lacks the text of one of its messages is dropped, so that what is taught is what was written.

An example begins with one beginning-of-sequence token if the tokenizer adds one. ``apply_chat_template`` does not add
it, so the saved template writes it if the model's own one does not. Those that a template writes before later turns, as
Llama 2's does, are kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, cast

from pipeline.data.chat_worker import REASONING
from pipeline.data.records import Conversation, Drops, Example, Message
from pipeline.data.templates import PLAIN_TEMPLATE, TemplateProcess, TurnRenderer, default_template, unusable
from pipeline.data.tokenizer import TextTokenizer, begin_with_bos

Span = tuple[int, int]  # first character, and the one after the last
WRITE_BOS = "{{ bos_token }}"  # in a template


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation, or its beginning, as token ids with a loss mask of the same length (1: trained on)."""

    input_ids: list[int]
    loss_mask: list[int]


def chat_template(tokenizer: TextTokenizer, name: Literal["model", "plain"]) -> str:
    """Returns the template for instruction tuning, as the model or ``templates.py`` provides it.

    Raises:
        UserError: ``name`` is ``model``, and the model's tokenizer has no template.
    """
    if name == "plain":
        return PLAIN_TEMPLATE if tokenizer.bos is None else WRITE_BOS + PLAIN_TEMPLATE
    return default_template(tokenizer.chat_template)


def end_of_turn(tokenizer: TextTokenizer, renderer: TurnRenderer, probe: Conversation) -> int:
    """Returns the token that ends an answer, at which the tuned model should stop generating.

    Args:
        probe: a question and its answer, which the template accepts.

    Raises:
        UserError: the template cannot be trained on.
    """
    example = _tokenize_probe(tokenizer, renderer, probe)
    return [token for token, is_target in zip(example.input_ids, example.loss_mask, strict=True) if is_target][-1]


def template_to_save(tokenizer: TextTokenizer, template: TemplateProcess) -> str:
    """Returns the template for the tuned model: the one that it is trained with, writing also the first BOS token.

    It is returned unchanged if the tokenizer adds no BOS token, if it writes one, or if that would change what follows:
    a few tokenizers encode the beginning of a text differently.
    """
    bos = tokenizer.inner.bos_token
    if tokenizer.bos is None or template.turns(template.probe)["texts"][0][0].startswith(bos):
        return template.template
    expected = _tokenize_probe(tokenizer, template, template.probe).input_ids
    with TemplateProcess(WRITE_BOS + template.template, tokenizer.special_tokens) as writing:
        is_equal = _tokenize_probe(tokenizer, writing, template.probe).input_ids == expected
    return WRITE_BOS + template.template if is_equal else template.template


def _tokenize_probe(tokenizer: TextTokenizer, renderer: TurnRenderer, probe: Conversation) -> TokenizedConversation:
    examples = ChatTokenizer(tokenizer, renderer, max_length=2**20, dropped=Drops()).tokenize(Example(probe, None))
    if not examples:
        raise unusable("it rejects a question with an answer")
    return examples[0]


class ChatTokenizer:
    """Tokenizes conversations with one template.

    Args:
        tokenizer: the model's tokenizer.
        renderer: renders them with the template.
        max_length: tokens per example. A longer conversation is cut after the last assistant turn that fits completely;
            if none does, it is dropped. Either is counted once, however many examples the conversation yields.
        dropped: counts conversations that are cut or dropped, by reason.
    """

    def __init__(self, tokenizer: TextTokenizer, renderer: TurnRenderer, max_length: int, dropped: Drops) -> None:
        self._tokenizer, self._renderer, self._max_length, self._dropped = tokenizer, renderer, max_length, dropped
        added_tokens = tokenizer.inner.added_tokens_decoder.items()
        control = {id_: token.content for id_, token in added_tokens if token.special}
        self._control_ids = frozenset(control) | {tokenizer.eos}
        self._control_texts = [*control.values(), tokenizer.inner.eos_token]

    def tokenize(self, example: Example) -> list[TokenizedConversation]:
        """Tokenizes a conversation.

        Returns:
            One example; one per assistant turn if the template rewrites earlier turns; or none if the conversation is
            dropped, which is counted.

        Raises:
            UserError: the template cannot be trained on, whatever the conversation.
        """
        conversation = cast("Conversation", example.content)
        # A control token in a message would end its turn early or start a fake one.
        parts = [part for message in conversation for part in _parts(message)]
        if any(text in part for part in parts for text in self._control_texts):
            return self._drop("control_token_in_text", example)
        answers = [message for message in conversation if message["role"] == "assistant"]
        if not any(answer["content"].strip() or "tool_calls" in answer for answer in answers):
            return self._drop("no_answer", example)
        if conversation[0]["role"] == "assistant":
            return self._drop("begins_with_the_assistant", example)
        rendered = self._renderer.turns(conversation)
        if "fault" in rendered:
            return self._drop(rendered["fault"], example)
        tokenized = [self._tokenize(text, turns) for text, turns in rendered["texts"]]
        kept = [fitting for each in tokenized if (fitting := self._fit(each)) is not None]
        if not kept:
            return self._drop("too_long", example)
        if _targets(kept) < _targets(tokenized):  # otherwise only text after the last assistant turn is lost
            self._dropped.add("truncated", example.location)
        return kept

    def _tokenize(self, text: str, turns: list[Span]) -> TokenizedConversation:
        encoded = self._tokenizer.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        mask = [0] * len(ids)
        for begin, end in turns:
            tokens = [index for index, (start, _) in enumerate(offsets) if begin <= start < end]
            # Train on the turn up to its last control token, which ends it. The model does not generate what follows.
            ends = [count for count, index in enumerate(tokens, 1) if ids[index] in self._control_ids]
            if not ends:
                raise unusable(
                    "it ends an assistant turn without a control token, so the model would never learn to stop"
                )
            for index in tokens[: ends[-1]]:
                mask[index] = 1
        bos = self._tokenizer.bos
        ids = begin_with_bos(ids, bos)
        mask = [0] * (len(ids) - len(mask)) + mask
        if bos is not None and ids[1] == bos:
            raise unusable("it begins with two beginning-of-sequence tokens")
        return TokenizedConversation(ids, mask)

    def _fit(self, tokenized: TokenizedConversation) -> TokenizedConversation | None:
        """Returns what fits completely, or None if not even the first assistant turn does."""
        ids, mask = tokenized.input_ids, tokenized.loss_mask
        if len(ids) <= self._max_length:
            return tokenized
        # Lengths at which an assistant turn has just ended.
        ends = [length for length in range(1, self._max_length + 1) if mask[length - 1] and not mask[length]]
        return TokenizedConversation(ids[: ends[-1]], mask[: ends[-1]]) if ends else None

    def _drop(self, reason: str, example: Example) -> list[TokenizedConversation]:
        self._dropped.add(reason, example.location)
        return []


def _targets(examples: list[TokenizedConversation]) -> int:
    return sum(sum(each.loss_mask) for each in examples)


def _parts(message: Message) -> list[str]:
    """Returns everything of a message that a template may write."""
    texts = [message[name] for name in ("content", *REASONING) if name in message]
    named = [*message.get("tools", ()), *message.get("tool_calls", ())]
    return [*texts, *(json.dumps(each, ensure_ascii=False) for each in named)]
