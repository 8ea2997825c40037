"""A model that continues conversations, by transformers' own ``generate`` and chat templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, TextStreamer

from pipeline.config.actions import Chat
from pipeline.errors import UserError, one_line
from pipeline.models.built import IncompleteModelError, load_complete

_Messages = Sequence[Mapping[str, str]]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # settings that a greedy search does not have


class ContextFull(Exception):
    """A conversation leaves no room for an answer. The message says how long it is."""


class ChatModel:
    """A finished model with its tokenizer and chat template.

    Args:
        name: how the user refers to it.
        directory: a Hugging Face model directory.
        device: where it computes: on a CPU in float32, on a GPU in bfloat16.
        settings: how it answers.

    Raises:
        UserError: transformers cannot load the model.
    """

    def __init__(self, name: str, directory: Path, device: Literal["cpu", "cuda"], settings: Chat) -> None:
        self.name = name
        self._settings = settings
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
            model = load_complete(directory, torch.bfloat16 if device == "cuda" else torch.float32)
        except (OSError, ValueError, IncompleteModelError) as error:
            raise UserError(
                setting="target",
                value=name,
                rule=f"transformers cannot load the model ({one_line(error)})",
                remedy="Choose another model, or build this one again.",
            ) from error
        self._model: Any = model.to(device)
        if settings.temperature == 0:  # transformers warns of settings that have no effect
            for setting in SAMPLING:
                setattr(self._model.generation_config, setting, None)

    def answer(self, messages: _Messages, show: Callable[[str], object] = lambda text: None) -> str:
        """Returns the next turn of a conversation.

        Args:
            messages: the conversation so far, which ends with a question.
            show: is called with the parts of the answer as they are generated.

        Raises:
            ContextFull: the conversation is as long as the longest text that the model can read.
        """
        prompt = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        length = prompt["input_ids"].shape[1]
        sampled = self._settings.temperature > 0
        torch.manual_seed(self._settings.seed + len(messages))  # the same for all models that are compared
        with torch.inference_mode():
            generated = self._model.generate(
                **prompt,
                max_new_tokens=min(self._settings.max_new_tokens, self._room(length)),
                do_sample=sampled,
                **({"temperature": self._settings.temperature} if sampled else {}),
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                streamer=_Streamer(self._tokenizer, show),
            )
        answer: str = self._tokenizer.decode(generated[0, length:], skip_special_tokens=True)
        return answer

    def _room(self, length: int) -> int:
        """Returns how many tokens fit behind a prompt of ``length`` tokens."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or length + 2**31
        if length >= limit:
            raise ContextFull(f"the conversation has {length:,} tokens, and the model reads at most {limit:,}")
        return int(limit - length)


class _Streamer(TextStreamer):
    """Passes complete words on as they are generated, without the prompt."""

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)
