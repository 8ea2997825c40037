"""The task ``python_docs_mcq``: which of four names from the standard library does a summary describe?

All four names are from one module, with preference for names whose summaries resemble the correct one, so that knowing
what a module is about does not help. The questions are about the modules that ``python_docs`` reserves for them: their
docstrings are in the corpus but in no instruction pair. The correct name is the longest one in a quarter of the
questions, the second longest in another quarter, and so on, so that choosing by length scores exactly chance.

A model's answer is the name after which it finds the summary most likely, in the layout of the corpus. The scored text
is the same for all four names, so no answer gains from being short, as it would if the names themselves were scored
(SmolLM2-135M-Instruct: 66 % this way, 38 % the other way around; chance is 25 %).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from pipeline.data.python_docs import Entry, question_entries, words
from pipeline.files import sha256_text

OPTIONS = 4
QUESTIONS = 300  # a multiple of OPTIONS
LONGEST_SUMMARY, LONGEST_NAME = 60, 40  # characters; short questions keep an evaluation cheap


@dataclass(frozen=True)
class Question:
    """One question. ``names[gold]`` is the name that the summary describes."""

    summary: str
    names: list[str]
    gold: int
    module: str


def build_questions(entries: Iterable[Entry] | None = None, number: int = QUESTIONS) -> list[Question]:
    """Returns at most ``number`` questions, the same number for each rank of the correct name by length.

    The questions are deterministic: all random choices are derived from hashes.
    """
    by_rank: dict[int, list[Question]] = defaultdict(list)
    taken: Counter[int] = Counter()
    # Each entry goes to the rank with the fewest questions so far for which its module has distractors.
    for entry, others in _candidates(question_entries() if entries is None else entries):
        for rank in sorted(range(OPTIONS), key=lambda rank: (taken[rank], sha256_text(f"{rank}{entry.name}"))):
            chosen = _distractors(entry, others, rank)
            if chosen is not None:
                by_rank[rank].append(_question(entry, chosen))
                taken[rank] += 1
                break
    each = min(number // OPTIONS, *(taken[rank] for rank in range(OPTIONS)))
    return [
        question for group in zip(*(by_rank[rank][:each] for rank in range(OPTIONS)), strict=True) for question in group
    ]


def _candidates(entries: Iterable[Entry]) -> list[tuple[Entry, list[Entry]]]:
    """Returns the entries that can be asked about, each with all such entries of its module.

    Modules take turns, so that large ones do not dominate.
    """
    modules: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        short = len(entry.summary) <= LONGEST_SUMMARY and len(entry.name) <= LONGEST_NAME
        if entry.kind != "module" and short and entry.has_usable_summary:
            modules[entry.module].append(entry)
    shuffled = [
        sorted(group, key=lambda entry: sha256_text(entry.name)) for group in modules.values() if len(group) >= OPTIONS
    ]
    turns = zip_longest(*shuffled)
    return [(entry, modules[entry.module]) for turn in turns for entry in turn if entry is not None]


def _distractors(entry: Entry, others: list[Entry], rank: int) -> list[Entry] | None:
    """Returns three other entries, of which ``rank`` have shorter names than ``entry`` and the rest longer ones."""
    usable = [other for other in others if _differs(other, entry)]
    usable.sort(key=lambda other: (-_shared_words(other, entry), sha256_text(entry.name + other.name)))
    shorter = [other for other in usable if len(other.name) < len(entry.name)][:rank]
    longer = [other for other in usable if len(other.name) > len(entry.name)][: OPTIONS - 1 - rank]
    # Without enough shorter or longer names in the module, the entry cannot have this rank.
    chosen = shorter + longer
    return chosen if len(chosen) == OPTIONS - 1 else None


def _differs(other: Entry, entry: Entry) -> bool:
    """Returns whether summaries and last parts of names differ: ``a.close`` cannot be a distractor for ``b.close``."""
    same_name = other.name.rpartition(".")[2] == entry.name.rpartition(".")[2]
    return not same_name and words(other.summary) != words(entry.summary)


def _shared_words(other: Entry, entry: Entry) -> int:
    return len(set(words(other.summary)) & set(words(entry.summary)))


def _question(entry: Entry, distractors: list[Entry]) -> Question:
    options = sorted([entry, *distractors], key=lambda option: sha256_text(entry.name + "?" + option.name))
    return Question(entry.summary, [option.name for option in options], options.index(entry), entry.module)
