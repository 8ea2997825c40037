"""Settings of single actions that use finished models: ``chat``."""

from __future__ import annotations

from pipeline.config.section import NonNegativeFloat, Positive, Section, Seed


class Chat(Section):
    """How the models answer with ``action=chat``."""

    max_new_tokens: Positive  # of an answer
    temperature: NonNegativeFloat  # 0: always the most probable token
    seed: Seed  # of the answers that are sampled, with a temperature above 0
