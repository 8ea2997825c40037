"""Records as documents for continual pre-training: one text each."""

from __future__ import annotations

from pipeline.data.files import Record
from pipeline.errors import UserError


def text_of(record: Record, text_field: str | None, setting: str) -> str:
    """The record's text; empty, which is dropped and counted as blank, where the column holds null.

    Args:
        text_field: the column that holds it; not used where the record is a text.
        setting: the source's dotted name, ``data.corpus``.

    Raises:
        UserError: the column is missing or holds something else than text.
    """
    if isinstance(record.value, str):
        return record.value
    if text_field is None or text_field not in record.value:
        raise UserError(
            setting=f"{setting}.text_field",
            value=text_field,
            rule=f"{record.where} has no such column; it has {', '.join(record.value)}",
            remedy=f"Set {setting}.text_field to the column that holds the text.",
        )
    text = "" if record.value[text_field] is None else record.value[text_field]
    if not isinstance(text, str):
        raise UserError(
            setting=f"{setting}.text_field",
            value=text_field,
            rule=f"{record.where} holds {type(text).__name__} there, and a document must be text",
            remedy=f"Set {setting}.text_field to the column that holds the text.",
        )
    return text
