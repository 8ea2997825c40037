"""A model that continues conversations, by transformers' own ``generate`` and chat templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, TextStreamer

from pipeline.config.actions import Chat
from pipeline.data.chat_worker import PARTS_PRELUDE, QUESTION
from pipeline.data.templates import default_template
from pipeline.data.tokenizer import added_bos, begin_with_bos, saved_chat_template
from pipeline.errors import UserError, one_line
from pipeline.models.loading import IncompleteModelError, load_for_inference
from pipeline.models.tensors import DTYPES, dtype_of

_Messages = Sequence[Mapping[str, str]]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # settings that a greedy search does not have


class ContextFull(Exception):
    """A conversation fills the model's context, so that no answer can be generated. The message gives its length."""


@dataclass(frozen=True)
class Generated:
    """An answer, and whether the model ended it, rather than ``max_new_tokens``."""

    text: str
    ended: bool


class ChatModel:
    """A finished model with its tokenizer and chat template.

    Args:
        name: how the user refers to it.
        model: a causal language model of transformers. Its generation config is changed.
        tokenizer: its tokenizer.
        settings: how it answers.
        template: the chat template; by default the tokenizer's.
        stop: tokens that end an answer, besides those of the model's generation config.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        settings: Chat,
        template: str | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._model, self._tokenizer, self._settings, self._template = model, tokenizer, settings, template
        self._bos = added_bos(tokenizer)
        config = model.generation_config
        if settings.temperature == 0:  # transformers warns of settings that have no effect
            for setting in SAMPLING:
                setattr(config, setting, None)
        own = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        self._stop = [*dict.fromkeys([*(own if isinstance(own, list) else [] if own is None else [own]), *stop])]
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self._stop), 0)

    @classmethod
    def load(
        cls, name: str, directory: Path, device: Literal["cpu", "cuda"], settings: Chat,
        template: str | None = None, stop: Sequence[int] = (),
    ) -> ChatModel:  # fmt: skip
        """Loads a model in the dtype that ``evaluate.dtype=auto`` would choose.

        Args:
            name: how the user refers to it.
            directory: a Hugging Face model directory.
            device: where it computes.
            settings, stop: as for the class.
            template: the chat template; by default the model's, which may be that of a processor.

        Raises:
            UserError: transformers cannot load it, or it has no chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
            model = load_for_inference(directory, DTYPES[dtype_of("auto", device)], device)
        except (OSError, ValueError, IncompleteModelError) as error:
            raise UserError(
                setting="target",
                value=name,
                rule=f"transformers cannot load the model ({one_line(error)})",
                remedy="Choose another model, or build this one again.",
            ) from error
        # transformers' tokenizers do not read the template of a processor (chat_template.json).
        template = template or default_template(saved_chat_template(tokenizer, directory))
        return cls(name, model, tokenizer, settings, _accepting_strings(template, tokenizer), stop)

    def answer(self, messages: _Messages, show: Callable[[str], object] = lambda text: None) -> str:
        """Returns the next turn of a conversation.

        Args:
            messages: the conversation so far, which ends with a question.
            show: is called with the parts of the answer as they are generated.

        Raises:
            ContextFull: the conversation is as long as the longest text that the model can read.
        """
        torch.manual_seed(self._settings.seed + len(messages))  # the same for all models that are compared
        return self._generate([messages], _Streamer(self._tokenizer, show))[0].text

    def answer_all(self, conversations: Sequence[_Messages]) -> list[Generated]:
        """Returns the next turns of several conversations, which are generated together.

        Raises:
            ContextFull: one of the conversations is too long.
        """
        torch.manual_seed(self._settings.seed)
        return self._generate(conversations, None)

    def _generate(self, conversations: Sequence[_Messages], streamer: TextStreamer | None) -> list[Generated]:
        prompts = [self._prompt(messages) for messages in conversations]
        length = max(map(len, prompts))
        ids_BT = torch.tensor([[self._padding] * (length - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = self._settings.temperature > 0
        with torch.inference_mode():
            generated_BT = self._model.generate(
                input_ids=ids_BT.to(self._model.device),
                attention_mask=mask_BT.to(self._model.device),
                max_new_tokens=min(self._settings.max_new_tokens, self._remaining_context(length)),
                do_sample=sampled,
                **({"temperature": self._settings.temperature} if sampled else {}),
                eos_token_id=self._stop or None,
                pad_token_id=self._padding,
                streamer=streamer,
            )
        return [self._until_stop(row[length:].tolist()) for row in generated_BT]

    def _prompt(self, messages: _Messages) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
        )
        # The template has written the special tokens, except for the first one that conversations are trained with.
        return begin_with_bos(self._tokenizer(text, add_special_tokens=False)["input_ids"], self._bos)

    def _until_stop(self, ids: list[int]) -> Generated:
        end = next((place for place, token in enumerate(ids) if token in self._stop), None)
        return Generated(self._tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)

    def _remaining_context(self, length: int) -> int:
        """Returns how many tokens can follow a prompt of ``length`` tokens in the model's context."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or length + 2**31
        if length >= limit:
            raise ContextFull(f"the conversation has {length:,} tokens, and the model reads at most {limit:,}")
        return int(limit - length)


def _accepting_strings(template: str, tokenizer: Any) -> str:
    """Returns a template that renders content given as a string. Those of many processors read only lists of parts."""
    for candidate in (template, PARTS_PRELUDE + template):
        try:
            text = tokenizer.apply_chat_template([QUESTION], chat_template=candidate, tokenize=False)
        except Exception:  # noqa: BLE001  a template can raise anything
            continue
        if QUESTION["content"] in text:
            return candidate
    return template


class _Streamer(TextStreamer):
    """Passes complete words on as they are generated, without the prompt."""

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)
