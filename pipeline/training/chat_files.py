"""What makes a tuned model a chat model for whoever loads it: its template, and where it stops."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.artifact import read_json, write_json

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"


def carry_chat_files(data_dir: Path, model_dir: Path) -> None:
    """The template that the conversations were rendered with, and its end of turn, go with the model that learnt them.

    A base model often stops at its end of text alone (Qwen2.5: ``<|endoftext|>``, turns end with ``<|im_end|>``), and
    would talk on after every answer. Token blocks of plain text change nothing.
    """
    template, end = data_dir / CHAT_TEMPLATE_FILE, read_json(data_dir / "dataset.json").get("end_of_turn")
    if template.is_file():
        shutil.copyfile(template, model_dir / CHAT_TEMPLATE_FILE)
    if end is not None:
        _stop_at(end, model_dir)


def _stop_at(token: int, model_dir: Path) -> None:
    place = model_dir / GENERATION_CONFIG_FILE
    config = read_json(place) if place.exists() else {}
    known = config.get("eos_token_id", read_json(model_dir / "config.json").get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if token not in stops:
        write_json(place, {**config, "eos_token_id": [*stops, token]})
