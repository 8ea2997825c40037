"""Grammatical minimal pairs from templates of our own: two sentences that differ in one word or in word order.

To see forgetting: a model that keeps its English prefers the grammatical one. In the manner of BLiMP (arXiv
1912.00582), with neither its sentences nor its templates. Deterministic, the same for every Python version.

A template names its words: ``{person[1]}`` is the plural of a word from ``WORDS["person"]``; ``{person2[0]}`` the
singular of another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

PAIRS_EACH = 40

# Templates are used in turn; <good|bad> is the difference.
PHENOMENA: dict[str, tuple[str, ...]] = {
    "agreement_with_noun_between": (
        "The {person[0]} {near} the {thing[1]} <{be[0]}|{be[1]}> {state}.",
        "The {person[1]} {near} the {thing[0]} <{be[1]}|{be[0]}> {state}.",
    ),
    "agreement_across_relative_clause": (
        "The {person[0]} that the {person2[1]} {see_base} <{act[0]}|{act[1]}> every day.",
        "The {person[1]} that the {person2[0]} {see_third} <{act[1]}|{act[0]}> every day.",
    ),
    "agreement_with_coordination": (
        "The {person[0]} and the {person2[0]} <{have[1]}|{have[0]}> {done} the {thing[1]}.",
    ),
    "agreement_with_existential": (
        "There <{be[1]}|{be[0]}> {several} {person[1]} {near} the {thing[0]}.",
        "There <{be[0]}|{be[1]}> {one} {person[0]} {near} the {thing[1]}.",
    ),
    "agreement_with_each_of": (
        "Each of the {person[1]} <{have[0]}|{have[1]}> {done} the {thing[0]}.",
        "Many of the {person[1]} <{have[1]}|{have[0]}> {done} the {thing[0]}.",
    ),
    "determiner_adjective_and_noun": (
        "{name} {did} {this[0]} {quality} <{thing[0]}|{thing[1]}>.",
        "{name} {did} {this[1]} {quality} <{thing[1]}|{thing[0]}>.",
    ),
    "reflexive": (
        "The {person[1]} {hurt} <themselves|itself>.",
        "The {person[1]} near {man} {hurt} <themselves|himself>.",
        "{man} said that the {person[1]} {hurt} <themselves|himself>.",
        "{woman} thought about how {man} {hurt} <himself|herself>.",
    ),
    "negative_polarity": (
        "<No|One> {person[0]} has ever {done} the {thing[0]}.",
        "The {person[0]} who {did} the {thing[0]} has <not|now> {done} any {thing2[1]}.",
        "<Nobody|Somebody> that the {person[1]} know has {done} the {thing[0]} yet.",
    ),
    "filler_and_gap": (
        "{name} knows <what|that> the {person[0]} {did} yesterday.",
        "{name} knows <that|what> the {person[0]} {did} the {thing[0]} yesterday.",
    ),
    "participle_after_auxiliary": (
        "The {person[0]} had <{irregular[1]}|{irregular[0]}> before noon.",
        "Yesterday the {person[1]} <{irregular[0]}|{irregular[1]}> again.",
    ),
    "verb_complement": (
        "The {person[0]} {enjoyed} <{work[1]}|to {work[0]}> in the {place}.",
        "The {person[1]} {hoped} <to {work[0]}|{work[1]}> in the {place}.",
    ),
    "pronoun_case": (
        "{name} and <{he[0]}|{he[1]}> {did} the {thing[0]}.",
        "The {person[0]} {saw} <{he[1]}|{he[0]}> {near} the {thing[0]}.",
    ),
    "countability": (
        "The {person[0]} {did} too <{much[0]}|{much[1]}> {mass}.",
        "The {person[1]} {did} too <{much[1]}|{much[0]}> {thing[1]}.",
    ),
}

SLOT = re.compile(r"\{(\w+?)(\d?)(?:\[\d\])?\}")
CONTRAST = re.compile(r"<(.+?)\|(.+?)>")


@dataclass(frozen=True)
class Pair:
    """Two sentences; the grammatical one is ``choices[gold]``."""

    phenomenon: str
    choices: list[str]
    gold: int


def build_pairs() -> list[Pair]:
    """``PAIRS_EACH`` distinct pairs of every phenomenon."""
    return [pair for phenomenon in PHENOMENA for pair in _pairs_of(phenomenon)]


def _pairs_of(phenomenon: str) -> Iterator[Pair]:
    templates = PHENOMENA[phenomenon]
    seen: set[str] = set()
    number = 0
    while len(seen) < PAIRS_EACH:
        template = templates[number % len(templates)]
        text = template.format(**_choose_words(template, f"{phenomenon} {number}"))
        number += 1
        if text in seen:
            continue
        seen.add(text)
        sentences = [_capitalised(CONTRAST.sub(rf"\{which}", text)) for which in (1, 2)]
        gold = _pick(text, 2)  # on either side, so that a tie in likelihood is worth nothing
        yield Pair(phenomenon, sentences if gold == 0 else sentences[::-1], gold)


def _choose_words(template: str, seed: str) -> dict[str, str | tuple[str, str]]:
    chosen: dict[str, str | tuple[str, str]] = {}
    for kind, number in SLOT.findall(template):
        if kind + number not in chosen:
            words = [word for word in WORDS[kind] if word not in chosen.values()]
            chosen[kind + number] = words[_pick(f"{seed} {kind}{number}", len(words))]
    return chosen


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _pick(seed: str, count: int) -> int:
    return int(sha256(seed.encode()).hexdigest(), 16) % count


# --------------------------------------------------------------------------------------------------
# The words of the minimal pairs: plain, common, and fit for every template that names them.
#
# Pairs are singular and plural, or the two forms that a template contrasts.

WORDS: dict[str, tuple[str, ...] | tuple[tuple[str, str], ...]] = {
    "person": (
        ("teacher", "teachers"), ("farmer", "farmers"), ("doctor", "doctors"), ("student", "students"),
        ("neighbor", "neighbors"), ("driver", "drivers"), ("painter", "painters"), ("singer", "singers"),
        ("soldier", "soldiers"), ("lawyer", "lawyers"), ("waiter", "waiters"), ("pilot", "pilots"),
        ("guest", "guests"), ("tourist", "tourists"), ("worker", "workers"), ("author", "authors"),
        ("manager", "managers"), ("nurse", "nurses"), ("child", "children"), ("dentist", "dentists"),
    ),
    "thing": (
        ("window", "windows"), ("picture", "pictures"), ("letter", "letters"), ("wall", "walls"),
        ("basket", "baskets"), ("bicycle", "bicycles"), ("machine", "machines"), ("garden", "gardens"),
        ("ladder", "ladders"), ("mirror", "mirrors"), ("bottle", "bottles"), ("chair", "chairs"),
        ("box", "boxes"), ("bench", "benches"), ("knife", "knives"), ("shelf", "shelves"),
        ("candle", "candles"), ("blanket", "blankets"), ("fence", "fences"), ("statue", "statues"),
    ),
    "name": ("Anna", "Peter", "Laura", "James", "Susan", "Robert", "Helen", "Martin", "Emily", "George"),
    "man": ("Peter", "James", "Robert", "Martin", "George", "David", "Thomas", "Edward"),
    "woman": ("Anna", "Laura", "Susan", "Helen", "Emily", "Karen", "Margaret", "Julia"),
    "place": ("garden", "kitchen", "village", "office", "library", "park", "city", "museum"),
    "mass": ("water", "furniture", "bread", "luggage", "sand", "equipment", "milk", "paper"),
    "he": (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")),
    "be": (("is", "are"), ("was", "were")),
    "have": (("has", "have"),),
    "this": (("this", "these"), ("that", "those")),
    "much": (("much", "many"),),
    "several": ("several", "many", "two", "some", "three"),
    "one": ("one", "a single", "only one"),
    "near": ("near", "behind", "beside", "next to", "in front of"),
    "state": ("tired", "happy", "quiet", "ready", "late", "alone", "busy", "hungry", "nervous", "polite"),
    "quality": ("old", "small", "broken", "heavy", "clean", "new", "green", "simple", "cheap", "strange"),
    "act": (
        ("laughs", "laugh"), ("sings", "sing"), ("works", "work"), ("travels", "travel"), ("cooks", "cook"),
        ("swims", "swim"), ("smiles", "smile"), ("complains", "complain"), ("writes", "write"), ("runs", "run"),
    ),
    "see_base": ("see", "like", "help", "know", "visit", "admire", "avoid", "trust"),
    "see_third": ("sees", "likes", "helps", "knows", "visits", "admires", "avoids", "trusts"),
    "did": ("sold", "moved", "found", "carried", "bought", "painted", "cleaned", "noticed"),
    "done": ("sold", "moved", "found", "carried", "bought", "painted", "cleaned", "noticed"),
    "saw": ("met", "saw", "noticed", "followed", "helped", "watched"),
    "hurt": ("hurt", "blamed", "defended", "praised", "surprised", "introduced"),
    "irregular": (
        ("ate", "eaten"), ("spoke", "spoken"), ("fell", "fallen"), ("drove", "driven"), ("wrote", "written"),
        ("sang", "sung"), ("drank", "drunk"), ("went", "gone"), ("began", "begun"), ("swam", "swum"),
    ),
    "work": (
        ("work", "working"), ("walk", "walking"), ("sit", "sitting"), ("read", "reading"), ("paint", "painting"),
        ("study", "studying"), ("live", "living"), ("wait", "waiting"),
    ),
    "enjoyed": ("enjoyed", "avoided", "finished", "kept", "disliked", "considered"),
    "hoped": ("hoped", "decided", "refused", "wanted", "agreed", "planned"),
}  # fmt: skip
