"""The words of the minimal pairs: plain, common, and fit for every template that names them.

Pairs are singular and plural, or the two forms that a template contrasts.
"""

from __future__ import annotations

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
