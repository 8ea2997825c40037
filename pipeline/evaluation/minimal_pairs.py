"""The task ``minimal_pairs``: two sentences that differ in one word or in word order, one of them grammatical.

It measures forgetting, since a model that has kept its English prefers the grammatical sentence. The design follows
BLiMP (arXiv 1912.00582), but the templates and sentences are not taken from it. The pairs are deterministic and do not
depend on the Python version.

A template names its words: ``{person[1]}`` is the plural of a word from ``WORDS["person"]``, and ``{person2[0]}`` is
the singular of a different one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.files import sha256_text

PAIRS_PER_PHENOMENON = 40

# The templates of a phenomenon are used in turn. <grammatical|ungrammatical> is the contrast.
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

# Words that are plain, common, and fit every template that names them. A pair is the singular and the plural, or the
# two forms that a template contrasts.
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

SLOT = re.compile(r"\{(\w+?)(\d?)(?:\[\d\])?\}")
CONTRAST = re.compile(r"<(.+?)\|(.+?)>")


@dataclass(frozen=True)
class Pair:
    """Two sentences, of which ``choices[gold]`` is grammatical."""

    phenomenon: str
    choices: list[str]
    gold: int


def build_pairs() -> list[Pair]:
    """Returns ``PAIRS_PER_PHENOMENON`` distinct pairs for every phenomenon."""
    return [pair for phenomenon in PHENOMENA for pair in _generate(phenomenon)]


def _generate(phenomenon: str) -> Iterator[Pair]:
    templates = PHENOMENA[phenomenon]
    seen: set[str] = set()
    number = 0
    while len(seen) < PAIRS_PER_PHENOMENON:
        template = templates[number % len(templates)]
        text = template.format(**_choose_words(template, f"{phenomenon} {number}"))
        number += 1
        if text in seen:
            continue
        seen.add(text)
        sentences = [CONTRAST.sub(rf"\{which}", text) for which in (1, 2)]
        sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
        # In either position, so that always choosing the same one (or breaking ties that way) scores chance.
        gold = _pick(text, 2)
        yield Pair(phenomenon, sentences if gold == 0 else sentences[::-1], gold)


def _choose_words(template: str, seed: str) -> dict[str, str | tuple[str, str]]:
    """Draws a word for every slot of a template, without repeating one."""
    chosen: dict[str, str | tuple[str, str]] = {}
    for kind, number in SLOT.findall(template):
        if kind + number not in chosen:
            words = [word for word in WORDS[kind] if word not in chosen.values()]
            chosen[kind + number] = words[_pick(f"{seed} {kind}{number}", len(words))]
    return chosen


def _pick(seed: str, count: int) -> int:
    """Returns a number below ``count`` that depends on ``seed`` alone."""
    return int(sha256_text(seed), 16) % count
