"""The built-in corpus: a small English-German grammar, with the constituency tree of every English sentence.

A sentence is first drawn as a meaning (`Clause`, `NounPhrase`). The meaning is then written in English, as a tree in
Penn brackets whose leaves are the sentence, and in German. To translate it, a model has to learn:
- order of verbs: the finite verb is second in main clauses, before the subject if an adverbial or a clause comes
  first, and last in subordinate and relative clauses; infinitives, participles and separable prefixes go to the end;
- order of other parts: English place-manner-time becomes time-manner-place; adverbs before the English verb
  follow the German one; definite objects precede the adverbials, indefinite ones follow time and manner; a relative
  clause directly follows a subject, but follows the verb if it belongs to the object;
- agreement of articles, adjectives, nouns, relative pronouns and verbs in gender, number and case, with some verbs
  that govern the dative; a noun in the genitive follows (the king's dog: der Hund des Königs), a name precedes;
- copying of names (an open class) and numbers.
The German is a function of the English: wherever German offers a choice, a rule of this file decides.

The test split has combinations of words that training never saw. A word pair (adjective, noun), (subject, verb) or
(verb, object) is held out when the CRC-32 of its English lemmas is divisible by HELD_OUT_EVERY. Training and
validation contain no held-out pair; each test sentence contains at least one. All words of the test split, except
names and numbers, occur in training, in other combinations. To accept a test sentence, one of its pairs is drawn at
random and has to be held out: accepting any sentence with a held-out pair would favour long sentences.
"""

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from pipeline.data.lexicon import (
    ADJECTIVES,
    CONJUNCTIONS,
    FREQUENCY_ADVERBS,
    INTO,
    MANNER_ADVERBS,
    MANNERS,
    MODALS,
    NOUNS,
    OBJECTS,
    PERSONS_ONLY,
    PLACES,
    SIMPLE_TENSE,
    SUBORDINATORS,
    SYLLABLES,
    TIMES,
    VERBS,
    WITHOUT_MANNER,
    Adjective,
    Noun,
    Verb,
)

# Probabilities of constructions. They set the difficulty of the corpus.
SENTENCE_SHARES = {"simple": 0.43, "coordinated": 0.15, "main first": 0.14, "main last": 0.14, "that": 0.14}
FRAME_SHARES = {
    "animate": 0.34, "dative": 0.13, "anything": 0.15, "thing": 0.1, "give": 0.1, "alone": 0.12, "motion": 0.06,
}  # fmt: skip
NAME = 0.28  # for subjects, objects, recipients and owners that are persons
COORDINATED_SUBJECT = 0.06
DETERMINER_SHARES = {"the": 0.48, "a": 0.16, "number": 0.12, "this": 0.1, "my": 0.09, "every": 0.05}
PLURAL = 0.3
ADJECTIVE = 0.3
OWNER = 0.1
RELATIVE = 0.25
MAX_RELATIVES = 1  # in one sentence
TENSE_SHARES = {"present": 0.35, "perfect": 0.25, "modal": 0.4}  # if it is not past
PAST = 0.4
PLACE = 0.35
TIME = 0.4
ADVERB = 0.25
FRONTED = 0.4  # for main clauses with an adverbial of time or place
LARGE_NUMBER = 0.1  # three digits; other numbers are below 100
LONG_NAME = 0.2  # three syllables; other names have two
HELD_OUT_EVERY = 10

Case = Literal["nom", "acc", "dat", "gen"]
T = TypeVar("T")


# Endings for m, f, n and plural. _STRONG: of dies-, and of adjectives that no inflected article precedes.
_STRONG = {
    "nom": ("er", "e", "es", "e"),
    "acc": ("en", "e", "es", "e"),
    "dat": ("em", "er", "em", "en"),
    "gen": ("es", "er", "es", "er"),
}
_EIN = _STRONG | {"nom": ("", "e", "", "e"), "acc": ("en", "e", "", "e")}
_DER = {
    "nom": ("der", "die", "das", "die"),
    "acc": ("den", "die", "das", "die"),
    "dat": ("dem", "der", "dem", "den"),
    "gen": ("des", "der", "des", "der"),
}
_RELATIVE = {case: (*forms[:3], "denen" if case == "dat" else forms[3]) for case, forms in _DER.items()}


@dataclass(frozen=True)
class Name:
    text: str
    plural = False
    definite = True
    relative = None


@dataclass(frozen=True)
class NounPhrase:
    noun: Noun
    determiner: str = "the"  # the, a, this, my, every; number; owner
    plural: bool = False
    number: int = 0
    adjective: Adjective | None = None
    owner: "Name | NounPhrase | None" = None
    relative: "Clause | None" = None

    @property
    def definite(self) -> bool:
        return self.determiner not in ("a", "number")


@dataclass(frozen=True)
class Coordination:
    left: Name | NounPhrase
    right: Name | NounPhrase
    plural = True


@dataclass(frozen=True)
class Adverbial:
    slot: str  # time, manner, place
    en: str  # tree
    de: str
    before_verb: bool = False  # in English
    phrase: NounPhrase | None = None  # the noun phrase that was drawn for it, if any


@dataclass(frozen=True)
class Clause:
    """A finite verb with its subject, objects and adverbials. In a relative clause the subject or object is None."""

    verb: Verb
    tense: str  # present, past, perfect or a modal
    subject: Name | NounPhrase | Coordination | None
    plural: bool  # number of the subject, or of the antecedent in a subject relative clause
    recipient: Name | NounPhrase | None = None
    object: Name | NounPhrase | None = None
    adverbials: tuple[Adverbial, ...] = ()
    fronted: Adverbial | None = None

    @property
    def object_case(self) -> Case:
        return "dat" if self.verb.frame == "dative" else "acc"


@dataclass(frozen=True)
class Sentence:
    kind: str  # a key of SENTENCE_SHARES
    clauses: tuple[Clause, ...]
    connector: str = ""


def _node(label: str, *children: str) -> str:
    return f"({label} {' '.join(child for child in children if child)})"


def english_phrase(phrase: Name | NounPhrase | Coordination) -> str:
    if isinstance(phrase, Name):
        return _node("NP", _node("NNP", phrase.text))
    if isinstance(phrase, Coordination):
        return _node("NP", english_phrase(phrase.left), "(CC and)", english_phrase(phrase.right))
    noun = phrase.noun.en_plural if phrase.plural else phrase.noun.en
    adjective = phrase.adjective.en if phrase.adjective else ""
    match phrase.determiner:
        case "owner":
            assert phrase.owner is not None
            determiner = f"{english_phrase(phrase.owner)[:-1]} (POS 's))"
        case "number":
            determiner = _node("CD", str(phrase.number))
        case "my":
            determiner = "(PRP$ my)"
        case "a":
            determiner = _node("DT", "an" if (adjective or noun)[0] in "aeiou" else "a")
        case "this":
            determiner = _node("DT", "these" if phrase.plural else "this")
        case word:
            determiner = _node("DT", word)
    tree = _node(
        "NP",
        determiner,
        _node("JJ", adjective) if adjective else "",
        _node("NNS" if phrase.plural else "NN", noun),
    )
    if phrase.relative is None:
        return tree
    if phrase.noun.kind != "person":
        pronoun = "(WDT that)"
    else:
        pronoun = "(WP who)" if phrase.relative.subject is None else "(WP whom)"
    return _node("NP", tree, _node("SBAR", _node("WHNP", pronoun), english_clause(phrase.relative)))


def english_clause(clause: Clause, *after: str) -> str:
    """The S node of a clause. `after` are nodes at the end of its verb phrase."""
    verb = clause.verb
    before = [_node("ADVP", adverbial.en) for adverbial in clause.adverbials if adverbial.before_verb]
    behind = [
        adverbial.en
        for slot in ("place", "manner", "time")
        for adverbial in clause.adverbials
        if adverbial.slot == slot and not adverbial.before_verb
    ]
    rest = [
        _node("PRT", _node("RP", verb.particle)) if verb.particle else "",
        english_phrase(clause.recipient) if clause.recipient else "",
        english_phrase(clause.object) if clause.object else "",
        *behind,
        *after,
    ]
    match clause.tense:
        case "present":
            finite = _node("VBP", verb.en) if clause.plural else _node("VBZ", verb.en_third)
            phrase = [*before, _node("VP", finite, *rest)]
        case "past":
            phrase = [*before, _node("VP", _node("VBD", verb.en_past), *rest)]
        case "perfect":
            finite = "(VBP have)" if clause.plural else "(VBZ has)"
            phrase = [_node("VP", finite, *before, _node("VP", _node("VBN", verb.en_participle), *rest))]
        case modal:
            finite = _node("MD", modal)
            phrase = [_node("VP", finite, *before, _node("VP", _node("VB", verb.en), *rest))]
    front = clause.fronted.en if clause.fronted else ""
    return _node("S", front, english_phrase(clause.subject) if clause.subject else "", *phrase)


def english_tree(sentence: Sentence) -> str:
    first, *others = sentence.clauses
    connector = sentence.connector
    match sentence.kind:
        case "simple":
            tree = english_clause(first)
        case "coordinated":
            tree = _node("S", english_clause(first), "(, ,)", _node("CC", connector), english_clause(others[0]))
        case "main last":
            clause = _node("SBAR", _node("IN", connector), english_clause(others[0]))
            tree = f"(S {clause} (, ,) {english_clause(first)[3:]}"
        case _:
            tree = english_clause(first, _node("SBAR", _node("IN", connector), english_clause(others[0])))
    tree = f"{tree[:-1]} (. .))"
    return re.sub(r" [^( ]", lambda letter: letter[0].upper(), tree, count=1)


def english_text(tree: str) -> str:
    """The sentence of a bracketed tree: its leaves as text."""
    return re.sub(r" (?=[.,]|'s )", "", " ".join(re.findall(r" ([^()]+)\)", tree)))


def german_noun(noun: Noun, case: Case, plural: bool) -> str:
    if plural:
        return noun.plural + ("n" if case == "dat" and noun.plural[-1] not in "ns" else "")
    weak = noun.gender == "m" and noun.genitive.endswith("n")  # den Jungen, dem Jungen
    return noun.genitive if case == "gen" or (weak and case != "nom") else noun.de


def german_phrase(phrase: Name | NounPhrase | Coordination, case: Case) -> list[str]:
    """The words of a phrase without its relative clause, whose position depends on the clause around it."""
    if isinstance(phrase, Name):
        return [phrase.text + ("s" if case == "gen" else "")]
    if isinstance(phrase, Coordination):
        return [*german_phrase(phrase.left, case), "und", *german_phrase(phrase.right, case)]
    column = 3 if phrase.plural else "mfn".index(phrase.noun.gender)
    before, behind = [], []
    strong = False  # must the adjective show the case?
    match phrase.determiner:
        case "owner" if isinstance(phrase.owner, Name):
            before, strong = german_phrase(phrase.owner, "gen"), True
        case "the" | "owner":
            before = [_DER[case][column]]
            behind = german_phrase(phrase.owner, "gen") if phrase.owner else []
        case "number":
            before, strong = [str(phrase.number)], True
        case "a" | "my":
            ending = _EIN[case][column]
            before, strong = [("ein" if phrase.determiner == "a" else "mein") + ending], not ending
        case word:
            before = [{"this": "dies", "every": "jed"}[word] + _STRONG[case][column]]
    if phrase.adjective:
        weak_ending = "e" if column < 3 and (case == "nom" or (case == "acc" and column > 0)) else "en"
        before.append(phrase.adjective.de + (_STRONG[case][column] if strong else weak_ending))
    return [*before, german_noun(phrase.noun, case, phrase.plural), *behind]


def german_relative(phrase: Name | NounPhrase | Coordination | None) -> list[str]:
    if not isinstance(phrase, NounPhrase) or phrase.relative is None:
        return []
    clause = phrase.relative
    column = 3 if phrase.plural else "mfn".index(phrase.noun.gender)
    pronoun = _RELATIVE["nom" if clause.subject is None else clause.object_case][column]
    return [",", pronoun, *german_clause(clause, "last"), ","]


def german_verb(clause: Clause) -> tuple[str, str, str]:
    """The finite form, its separable prefix or "", and the infinitive or participle or ""."""
    verb, plural = clause.verb, clause.plural
    match clause.tense:
        case "present":
            return verb.de if plural else verb.third, verb.prefix, ""
        case "past":
            ending = ("n" if verb.past.endswith("e") else "en") if plural else ""
            return verb.past + ending, verb.prefix, ""
        case "perfect":
            plural_form = {"hat": "haben", "ist": "sind"}[verb.auxiliary]
            return plural_form if plural else verb.auxiliary, "", verb.participle
        case modal:
            return MODALS[modal][plural], "", verb.prefix + verb.de


def german_clause(clause: Clause, verb_place: Literal["second", "first", "last"]) -> list[str]:
    """The words of a clause. With the verb first or last, the caller adds what precedes the clause."""
    subject = german_phrase(clause.subject, "nom") if clause.subject else []
    subject += german_relative(clause.subject)
    recipient = german_phrase(clause.recipient, "dat") if clause.recipient else []
    object_ = german_phrase(clause.object, clause.object_case) if clause.object else []
    early, late = (object_, []) if clause.object and clause.object.definite else ([], object_)
    slots = {adverbial.slot: [adverbial.de] for adverbial in clause.adverbials}
    time, manner, place = (slots.get(slot, []) for slot in ("time", "manner", "place"))
    middle = [*recipient, *early, *time, *manner, *late, *place]
    finite, prefix, infinite = german_verb(clause)
    after = german_relative(clause.object)
    if verb_place == "last":
        return [*subject, *middle, infinite, prefix + finite, *after]
    if verb_place == "first":
        start = [finite, *subject]
    elif clause.fronted:
        start = [clause.fronted.de, finite, *subject]
    else:
        start = [*subject, finite]
    return [*start, *middle, prefix, infinite, *after]


def german_text(sentence: Sentence) -> str:
    first, *others = sentence.clauses
    match sentence.kind:
        case "simple":
            words = german_clause(first, "second")
        case "coordinated":
            comma = "," if sentence.connector == "but" else ""
            conjunction = CONJUNCTIONS[sentence.connector]
            words = [
                *german_clause(first, "second"), comma, conjunction, *german_clause(others[0], "second"),
            ]  # fmt: skip
        case "main last":
            subordinator = SUBORDINATORS[sentence.connector]
            words = [subordinator, *german_clause(others[0], "last"), ",", *german_clause(first, "first")]
        case "main first":
            subordinator = SUBORDINATORS[sentence.connector]
            words = [*german_clause(first, "second"), ",", subordinator, *german_clause(others[0], "last")]
        case _:
            words = [*german_clause(first, "second"), ",", "dass", *german_clause(others[0], "last")]
    text = re.sub("( ,)+", ",", " ".join(word for word in words if word)).removesuffix(",")
    return text[0].upper() + text[1:] + "."


class Sampler:
    """Draws the meaning of sentences. Uses only random(), whose algorithm Python guarantees not to change."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.past = False  # tense of the whole sentence
        self.relatives_left = 0
        self.used: set[str] = set()  # a noun occurs only once in a sentence

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def pick_weighted(self, shares: dict[str, float]) -> str:
        point = self.rng.random() * sum(shares.values())
        for key, share in shares.items():
            point -= share
            if point < 0:
                return key
        return key  # rounding

    def number(self) -> int:
        return 100 + int(self.rng.random() * 900) if self.chance(LARGE_NUMBER) else 2 + int(self.rng.random() * 98)

    def name(self) -> Name:
        count = 3 if self.chance(LONG_NAME) else 2
        syllables = [self.pick(SYLLABLES)]
        while len(syllables) < count:
            syllables.append(self.pick([syllable for syllable in SYLLABLES if syllable not in syllables]))
        return Name("".join(syllables).capitalize())

    def sentence(self) -> Sentence:
        self.past = self.chance(PAST)
        self.relatives_left = MAX_RELATIVES
        self.used = set()
        kind = self.pick_weighted(SENTENCE_SHARES)
        if kind == "simple":
            return Sentence(kind, (self.clause(front=True),))
        if kind == "coordinated":
            connector = self.pick(list(CONJUNCTIONS))
            return Sentence(kind, (self.clause(front=True), self.clause(front=True)), connector)
        if kind == "that":
            return Sentence(kind, (self.clause(frames=["that"], front=True), self.clause()), "that")
        connector = self.pick([word for word in SUBORDINATORS if word != "if" or not self.past])
        main = self.clause(front=kind == "main first")
        return Sentence(kind, (main, self.clause(simple_tense=connector in SIMPLE_TENSE)), connector)

    def clause(
        self,
        *,
        frames: Sequence[str] = tuple(FRAME_SHARES),
        front: bool = False,
        simple_tense: bool = False,
        gap: Literal["", "subject", "object"] = "",
        plural: bool = False,
    ) -> Clause:
        """A clause with one of the frames. `gap` is the part that a relative clause omits, `plural` its number."""
        frame = self.pick_weighted({frame: FRAME_SHARES.get(frame, 1) for frame in frames})
        subject: Name | NounPhrase | Coordination | None = None
        if gap != "subject":
            subject = self.subject(["person"] if frame in PERSONS_ONLY else ["person", "animal"], not gap)
            plural = subject.plural
        recipient = self.phrase(["person"], ["the", "this", "my"]) if frame == "give" else None
        object_ = None
        if gap != "object" and frame in OBJECTS:
            object_ = self.phrase(OBJECTS[frame])
            if not gap:
                object_ = self.with_relative(object_)
        verb = self.pick(VERBS[frame])
        tense = "past"
        if not self.past:
            tense = "present" if simple_tense else self.pick_weighted(TENSE_SHARES)
        bare = (object_ is not None and object_.relative is not None) or frame == "that"
        adverbials, fronted = self.adverbials(verb, tense, front, bare, bool(gap))
        if tense == "modal":
            tense = self.pick(list(MODALS))
        return Clause(verb, tense, subject, plural, recipient, object_, tuple(adverbials), fronted)

    def adverbials(
        self, verb: Verb, tense: str, front: bool, bare: bool, single: bool
    ) -> tuple[list[Adverbial], Adverbial | None]:
        """The adverbials inside the clause, and the fronted one or None.

        `bare` keeps only adverbs of frequency inside: any other adverbial would follow the embedded clause and seem
        to belong to it. `single` keeps at most one adverbial, inside.
        """
        found: list[Adverbial] = []
        if verb.frame == "motion":
            found.append(self.place(INTO))
        elif self.chance(PLACE) and verb.frame != "that":
            found.append(self.place(self.pick(PLACES)))
        often = self.chance(ADVERB / 2)
        if often:
            en, de = self.pick(FREQUENCY_ADVERBS)
            found.append(Adverbial("time", _node("RB", en), de, before_verb=True))
        elif self.chance(TIME):
            found.append(self.time(tense))
        if self.chance(ADVERB) and verb.en not in WITHOUT_MANNER and verb.frame != "that":
            if often or self.chance(0.5):
                en, de = self.pick(MANNERS)
                found.append(Adverbial("manner", en, de))
            else:
                en, de = self.pick(MANNER_ADVERBS)
                found.append(Adverbial("manner", _node("RB", en), de, before_verb=True))
        if single:
            return found[:1], None
        fronted = None
        if front and self.chance(FRONTED):
            movable = [
                adverbial
                for adverbial in found
                if not adverbial.before_verb
                and (adverbial.slot == "time" or (adverbial.slot == "place" and verb.frame != "motion"))
            ]
            if movable:
                fronted = self.pick(movable)
                found.remove(fronted)
        if bare:
            found = [adverbial for adverbial in found if adverbial.before_verb and adverbial.slot == "time"]
        return found, fronted

    def place(self, preposition: tuple[str, str]) -> Adverbial:
        phrase = self.noun_phrase(["place"], ["the", "the", "the", "this", "my"], singular=True)
        en, de = preposition
        words = [de, *german_phrase(phrase, "acc" if preposition is INTO else "dat")]
        return Adverbial(
            "place", en.format(english_phrase(phrase)), " ".join(words).replace("in dem ", "im "), phrase=phrase
        )

    def time(self, tense: str) -> Adverbial:
        en, de = self.pick(TIMES[tense])
        digits = {
            "number": self.number(),
            "hour": 1 + int(self.rng.random() * 12),
            "year": 1900 + int(self.rng.random() * 120),
        }
        return Adverbial("time", en.format(**digits), de.format(**digits))

    def subject(self, kinds: Sequence[str], relative: bool) -> Name | NounPhrase | Coordination:
        if self.chance(COORDINATED_SUBJECT):
            determiners = ["the", "my"]
            # Without owners: in "Mila and the king's dogs", Mila could be an owner.
            left = self.phrase(kinds, determiners, owned=False)
            return Coordination(left, self.phrase(kinds, determiners, owned=False))
        phrase = self.phrase(kinds)
        return self.with_relative(phrase) if relative else phrase

    def phrase(
        self, kinds: Sequence[str], determiners: Sequence[str] = (), *, owned: bool = True
    ) -> Name | NounPhrase:
        """A name or a noun phrase without a relative clause."""
        if "person" in kinds and self.chance(NAME):
            return self.name()
        return self.noun_phrase(kinds, determiners, owned=owned)

    def noun_phrase(
        self, kinds: Sequence[str], determiners: Sequence[str] = (), *, singular: bool = False, owned: bool = True
    ) -> NounPhrase:
        noun = self.pick([noun for kind in kinds for noun in NOUNS[kind] if noun.en not in self.used])
        self.used.add(noun.en)
        adjective = self.pick(ADJECTIVES[noun.kind]) if self.chance(ADJECTIVE) else None
        determiner = self.pick(determiners) if determiners else self.pick_weighted(DETERMINER_SHARES)
        if determiner == "number":
            return NounPhrase(noun, determiner, True, self.number(), adjective)
        plural = not singular and determiner in ("the", "this", "my") and self.chance(PLURAL)
        owner: Name | NounPhrase | None = None
        if owned and determiner == "the" and self.chance(OWNER):
            determiner = "owner"
            owner = (
                self.name()
                if self.chance(NAME)
                else self.noun_phrase(["person"], ["the", "this", "my"], singular=True, owned=False)
            )
        return NounPhrase(noun, determiner, plural, adjective=adjective, owner=owner)

    def with_relative(self, phrase: Name | NounPhrase) -> Name | NounPhrase:
        if isinstance(phrase, Name) or phrase.owner or not self.relatives_left or not self.chance(RELATIVE):
            return phrase
        self.relatives_left -= 1
        gap: Literal["subject", "object"] = "object"
        if phrase.noun.kind == "thing":
            frames = ["anything", "thing", "give"]
        elif self.chance(0.5):
            frames = ["animate", "dative", "anything"]
        else:
            gap = "subject"
            frames = [frame for frame in FRAME_SHARES if phrase.noun.kind == "person" or frame not in PERSONS_ONLY]
        return replace(phrase, relative=self.clause(frames=frames, gap=gap, plural=phrase.plural))


def combinations(sentence: Sentence) -> Iterator[tuple[str, str, str]]:
    """The word pairs of a sentence that can be held out, each (relation, lemma, lemma) in English."""
    for clause in sentence.clauses:
        yield from _clause_combinations(clause, None)


def _clause_combinations(clause: Clause, antecedent: NounPhrase | None) -> Iterator[tuple[str, str, str]]:
    verb = f"{clause.verb.en} {clause.verb.particle}".rstrip()
    subject = clause.subject or antecedent
    subjects = [subject.left, subject.right] if isinstance(subject, Coordination) else [subject]
    object_ = clause.object or (antecedent if clause.subject else None)
    yield from (("subject", phrase.noun.en, verb) for phrase in subjects if isinstance(phrase, NounPhrase))
    if isinstance(object_, NounPhrase):
        yield "object", verb, object_.noun.en
    within = [*subjects, clause.recipient, clause.object, *(place.phrase for place in clause.adverbials)]
    within.append(clause.fronted.phrase if clause.fronted else None)
    for phrase in within:
        if isinstance(phrase, NounPhrase) and phrase is not antecedent:
            yield from _phrase_combinations(phrase)


def _phrase_combinations(phrase: NounPhrase) -> Iterator[tuple[str, str, str]]:
    if phrase.adjective:
        yield "adjective", phrase.adjective.en, phrase.noun.en
    if isinstance(phrase.owner, NounPhrase):
        yield from _phrase_combinations(phrase.owner)
    if phrase.relative:
        yield from _clause_combinations(phrase.relative, phrase)


def held_out(combination: tuple[str, str, str]) -> bool:
    return zlib.crc32(" ".join(combination).encode()) % HELD_OUT_EVERY == 0


def corpus(*, seed: int, train_pairs: int, valid_pairs: int, test_pairs: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield (split, English, German, English tree) of train, then valid, then test, without duplicate sentences."""
    sampler = Sampler(random.Random(seed))
    seen: set[str] = set()
    for split, count in (("train", train_pairs), ("valid", valid_pairs), ("test", test_pairs)):
        while count:
            sentence = sampler.sentence()
            pairs = list(combinations(sentence))
            if split == "test":
                if not pairs or not held_out(sampler.pick(pairs)):
                    continue
            elif any(held_out(pair) for pair in pairs):
                continue
            tree, german = english_tree(sentence), german_text(sentence)
            english = english_text(tree)
            if english in seen or german in seen:
                continue
            seen |= {english, german}
            count -= 1
            yield split, english, german, tree


def generate(
    folder: Path, *, seed: int, train_pairs: int, valid_pairs: int, test_pairs: int, progress: bool = True
) -> None:
    """Write {train,valid,test}.{en,de,trees} into an existing folder, with one sentence or tree per line."""
    lines = corpus(seed=seed, train_pairs=train_pairs, valid_pairs=valid_pairs, test_pairs=test_pairs)
    total = train_pairs + valid_pairs + test_pairs
    with ExitStack() as stack:
        files = {
            (split, kind): stack.enter_context(open(folder / f"{split}.{kind}", "w", encoding="utf-8", newline="\n"))
            for split in ("train", "valid", "test")
            for kind in ("en", "de", "trees")
        }
        for split, *texts in tqdm(lines, "grammar", total, unit=" pairs", disable=not progress):
            for kind, text in zip(("en", "de", "trees"), texts, strict=True):
                files[split, kind].write(text + "\n")
