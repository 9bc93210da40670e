"""The generated corpus, checked by tables and parsers of this file. Only the word lists come from the grammar."""

import hashlib
import re
import statistics
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import yaml

from pipeline.data.grammar import (
    ADJECTIVES,
    NOUNS,
    VERBS,
    Adverbial,
    Clause,
    Coordination,
    Name,
    NounPhrase,
    Sentence,
    english_text,
    english_tree,
    generate,
    german_text,
)

SETTINGS = yaml.safe_load((Path(__file__).parents[3] / "conf/data/grammar.yaml").read_text())["data"]
SIZES = {key: SETTINGS[key] for key in ("seed", "train_pairs", "valid_pairs", "test_pairs")}
# After an intended change, set it to the value that the failing test prints.
CHECKSUM = "89c39d1030af09dc807e3a0e703118103ac2d7f40f8d0cdf8b73e494ecc54ac8"

NOUN_LIST = [noun for nouns in NOUNS.values() for noun in nouns]
VERB_LIST = [verb for verbs in VERBS.values() for verb in verbs]
NOUN = {noun.en: noun for noun in NOUN_LIST}
VERB = {(verb.frame, verb.en): verb for verb in VERB_LIST}
ADJECTIVE = {adjective.en: adjective for adjectives in ADJECTIVES.values() for adjective in adjectives}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """{split: [(English, German, tree)]} for the settings of conf/data/grammar.yaml, and the files' checksum."""
    folder = tmp_path_factory.mktemp("grammar")
    generate(folder, **SIZES, progress=False)
    checksum = hashlib.sha256()
    splits = {}
    for split in ("train", "valid", "test"):
        sides = []
        for kind in ("en", "de", "trees"):
            content = (folder / f"{split}.{kind}").read_bytes()
            checksum.update(content)
            assert content.endswith(b"\n")
            sides.append(content.decode().removesuffix("\n").split("\n"))
        splits[split] = list(zip(*sides, strict=True))
    return splits, checksum.hexdigest()


@pytest.fixture(scope="module")
def pairs(corpus):
    return [pair for split in corpus[0].values() for pair in split]


@pytest.fixture(scope="module")
def roots(corpus):
    """{split: [parsed tree]}"""
    return {split: [parse(tree) for _, _, tree in lines] for split, lines in corpus[0].items()}


def noun(english, determiner="the", adjective=None, **fields):
    adjective = ADJECTIVE[adjective] if adjective else None
    return NounPhrase(NOUN[english], determiner, adjective=adjective, **fields)


def clause(frame, verb, tense, subject, plural=False, **fields):
    return Clause(VERB[frame, verb], tense, subject, plural, **fields)


TODAY = Adverbial("time", "(NP (NN today))", "heute")
MONDAY = Adverbial("time", "(PP (IN on) (NP (NNP Monday)))", "am Montag")
CARE = Adverbial("manner", "(PP (IN with) (NP (JJ great) (NN care)))", "mit großer Sorgfalt")
SECRETLY = Adverbial("manner", "(RB secretly)", "heimlich", before_verb=True)
GARDEN = Adverbial("place", "(PP (IN in) (NP (DT the) (NN garden)))", "im Garten")
BY_HAND = [
    (
        Sentence(
            "simple",
            (clause("animate", "pick", "must", noun("teacher", "the", "old"), object=noun("child"), fronted=TODAY),),
        ),
        "Today the old teacher must pick up the child.",
        "Heute muss der alte Lehrer das Kind abholen.",
    ),
    (
        Sentence(
            "simple",
            (
                clause(
                    "thing",
                    "repair",
                    "past",
                    Name("Kalo"),
                    object=noun("bicycle", "number", "expensive", plural=True, number=14),
                    adverbials=(MONDAY, GARDEN, CARE),
                ),
            ),
        ),
        "Kalo repaired 14 expensive bicycles in the garden with great care on Monday.",
        "Kalo reparierte am Montag mit großer Sorgfalt 14 teure Fahrräder im Garten.",
    ),
    (
        Sentence(
            "simple",
            (
                clause(
                    "animate",
                    "attack",
                    "perfect",
                    noun(
                        "dog",
                        relative=clause("dative", "follow", "present", None, object=noun("boy", "a", "young")),
                    ),
                    object=noun("student"),
                    adverbials=(SECRETLY, GARDEN),
                ),
            ),
        ),
        "The dog that follows a young boy has secretly attacked the student in the garden.",
        "Der Hund, der einem jungen Jungen folgt, hat den Studenten heimlich im Garten angegriffen.",
    ),
    (
        Sentence(
            "main last",
            (
                clause("alone", "get", "present", noun("bear", "this", plural=True), plural=True),
                clause(
                    "give",
                    "lend",
                    "perfect",
                    noun("aunt", "my"),
                    recipient=noun("child", plural=True),
                    object=noun("apple", "a", "red"),
                    adverbials=(TODAY,),
                ),
            ),
            "because",
        ),
        "Because my aunt has lent the children a red apple today, these bears get up.",
        "Weil meine Tante den Kindern heute einen roten Apfel geliehen hat, stehen diese Bären auf.",
    ),
    (
        Sentence(
            "that",
            (
                clause("that", "know", "present", noun("farmer")),
                clause(
                    "animate",
                    "mock",
                    "present",
                    noun("horse", "owner", "young", plural=True, owner=noun("king")),
                    plural=True,
                    object=noun("woman", "owner", "old", owner=Name("Vimo")),
                ),
            ),
            "that",
        ),
        "The farmer knows that the king's young horses mock Vimo's old woman.",
        "Der Bauer weiß, dass die jungen Pferde des Königs Vimos alte Frau auslachen.",
    ),
    (
        Sentence(
            "coordinated",
            (
                clause(
                    "dative",
                    "help",
                    "will",
                    Coordination(Name("Lora"), noun("witch")),
                    plural=True,
                    object=noun(
                        "neighbour",
                        plural=True,
                        relative=clause("dative", "thank", "past", noun("thief", "every")),
                    ),
                ),
                clause("animate", "invite", "past", noun("mouse", "a", "old"), object=Name("Runa")),
            ),
            "and",
        ),
        "Lora and the witch will help the neighbours whom every thief thanked, and an old mouse invited Runa.",
        "Lora und die Hexe werden den Nachbarn helfen, denen jeder Dieb dankte, und eine alte Maus lud Runa ein.",
    ),
]


@pytest.mark.parametrize(("sentence", "english", "german"), BY_HAND)
def test_grammar_translates_a_meaning_as_a_person_would(sentence, english, german):
    assert english_text(english_tree(sentence)) == english
    assert german_text(sentence) == german


def test_english_tree_of_a_sentence_with_a_relative_clause():
    sentence = BY_HAND[2][0]
    assert english_tree(sentence) == (
        "(S (NP (NP (DT The) (NN dog))"
        " (SBAR (WHNP (WDT that)) (S (VP (VBZ follows) (NP (DT a) (JJ young) (NN boy))))))"
        " (VP (VBZ has) (ADVP (RB secretly)) (VP (VBN attacked) (NP (DT the) (NN student))"
        " (PP (IN in) (NP (DT the) (NN garden))))) (. .))"
    )


def test_generate_gives_the_same_bytes_everywhere(corpus):
    assert corpus[1] == CHECKSUM


def test_corpus_of_another_seed_has_other_sentences(tmp_path):
    texts = []
    for seed in (5, 5, 7):
        folder = tmp_path / str(len(texts))
        folder.mkdir()
        generate(folder, seed=seed, train_pairs=31, valid_pairs=3, test_pairs=11, progress=False)
        texts.append([(folder / f"{split}.de").read_text() for split in ("train", "valid", "test")])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_corpus_has_the_pairs_asked_for_and_no_sentence_twice(corpus, pairs):
    splits, _ = corpus
    assert {f"{split}_pairs": len(lines) for split, lines in splits.items()} | {"seed": SIZES["seed"]} == SIZES
    for side in (0, 1):
        assert len({pair[side] for pair in pairs}) == len(pairs)


def test_corpus_sentences_have_the_lengths_of_real_ones(corpus):
    for lines in corpus[0].values():
        lengths = [len(english.split()) for english, _, _ in lines]
        assert 10 < statistics.mean(lengths) < 18
        assert max(lengths) < 50


def parse(tree):
    """Parse a bracketed tree into nested lists [label, child, ...]."""
    stack = [[]]
    for token in re.findall(r"\(|\)|[^\s()]+", tree):
        if token == "(":
            stack.append([])
        elif token == ")":
            node = stack.pop()
            stack[-1].append(node)
        else:
            stack[-1].append(token)
    (roots,) = stack  # the brackets are balanced
    (root,) = roots
    return root


def leaves(node):
    """Return (tag, word) of each leaf, from left to right."""
    if isinstance(node[1], str):
        assert len(node) == 2
        return [(node[0], node[1])]
    return [leaf for child in node[1:] for leaf in leaves(child)]


def test_english_tree_has_the_english_tokens_as_leaves(pairs, roots):
    for (english, _, _), root in zip(pairs, chain(*roots.values()), strict=True):
        assert root[0] == "S"
        assert [word for _, word in leaves(root)] == re.findall(r"o'clock|'s|\w+|[.,]", english)


def test_english_phrase_articles_fit_the_next_sound(pairs):
    for english, _, _ in pairs:
        for article, letter in re.findall(r"\b([Aa]n?) (\w)", english):
            assert (article.lower() == "an") == (letter in "aeiou"), english


# Cases and genders (p: plural) that an article allows.
DER_WORDS = {
    "der": "nom-m dat-f gen-f", "die": "nom-f acc-f nom-p acc-p", "das": "nom-n acc-n", "den": "acc-m dat-p",
    "dem": "dat-m dat-n", "des": "gen-m gen-n", "im": "dat-m dat-n",
    "dieser": "nom-m dat-f gen-f", "diese": "nom-f acc-f nom-p acc-p", "dieses": "nom-n acc-n gen-m gen-n",
    "diesen": "acc-m dat-p", "diesem": "dat-m dat-n",
    "jeder": "nom-m dat-f", "jede": "nom-f acc-f", "jedes": "nom-n acc-n", "jeden": "acc-m", "jedem": "dat-m dat-n",
}  # fmt: skip
EIN_WORDS = {
    "ein": "nom-m nom-n acc-n", "eine": "nom-f acc-f", "einen": "acc-m", "einem": "dat-m dat-n", "einer": "dat-f",
    "mein": "nom-m nom-n acc-n", "meine": "nom-f acc-f nom-p acc-p", "meinen": "acc-m dat-p",
    "meinem": "dat-m dat-n", "meiner": "dat-f gen-f", "meines": "gen-m gen-n",
}  # fmt: skip
ARTICLES = {word: set(readings.split()) for word, readings in (DER_WORDS | EIN_WORDS).items()}
# "der" is masculine nominative or feminine dative.
RELATIVE_PRONOUNS = {"der": "mf", "die": "fp", "das": "n", "den": "m", "dem": "mn", "denen": "p"}
# Endings of an adjective, by the word before it.
AFTER_DER = {"e": "nom-m nom-f nom-n acc-f acc-n"}
AFTER_DER["en"] = "acc-m dat-m dat-f dat-n gen-m gen-f gen-n nom-p acc-p dat-p gen-p"
AFTER_EIN = {
    "er": "nom-m", "e": "nom-f acc-f", "es": "nom-n acc-n",
    "en": "acc-m dat-m dat-f dat-n gen-m gen-f gen-n nom-p acc-p dat-p gen-p",
}  # fmt: skip
AFTER_NOTHING = {
    "er": "nom-m dat-f", "e": "nom-f acc-f nom-p acc-p", "es": "nom-n acc-n",
    "en": "acc-m dat-p", "em": "dat-m dat-n",
}  # fmt: skip
WEAK_NOUNS = {"Junge", "Student", "Nachbar", "Bauer", "Bär"}
SUBORDINATORS = {"weil", "obwohl", "während", "bevor", "wenn", "dass"}
STARTS = {"heute", "gestern", "morgen", "letzte", "nächste", "am", "um"}
PREPOSITIONS = ("in", "im", "hinter", "neben", "vor")


def noun_readings():
    readings = {}
    for entry in NOUN_LIST:
        forms = {f"nom-{entry.gender}": entry.de, f"gen-{entry.gender}": entry.genitive}
        forms |= {f"{case}-p": entry.plural for case in ("nom", "acc", "gen")}
        for case in ("acc", "dat"):
            forms[f"{case}-{entry.gender}"] = entry.genitive if entry.de in WEAK_NOUNS else entry.de
        forms["dat-p"] = entry.plural if entry.plural.endswith(("n", "s")) else entry.plural + "n"
        for reading, form in forms.items():
            readings.setdefault(form, set()).add(reading)
    return readings


NOUN_READINGS = noun_readings()
ADJECTIVE_FORM = f"(?:{'|'.join(adjective.de for adjective in ADJECTIVE.values())})e[nrsm]?"
NOUN_PHRASE = re.compile(
    r"(?:(?P<preposition>\b(?:in|hinter|neben|vor)) )?"
    rf"(?P<before>\b(?:{'|'.join(ARTICLES)}|\d+|[A-Z][a-z]+s)) (?:(?P<adjective>{ADJECTIVE_FORM}) )?"
    rf"(?P<noun>{'|'.join(sorted(NOUN_READINGS, key=len, reverse=True))})\b"
)


def phrase_readings(match):
    """Return the cases and genders that article, adjective and noun allow together."""
    before, adjective = match["before"], match["adjective"]
    readings = set(NOUN_READINGS[match["noun"]])
    if before in ARTICLES:
        readings &= ARTICLES[before]
    elif before.isdigit():
        readings &= {"nom-p", "acc-p", "dat-p"}
    endings = AFTER_DER if before in DER_WORDS else AFTER_EIN if before in EIN_WORDS else AFTER_NOTHING
    if adjective:
        ending = re.search("e[nrsm]?$", adjective)[0]
        readings &= set(endings[ending].split())
    return readings


def lower_first(german):
    """Make the first letter lower case, unless the sentence starts with a name."""
    first = german.split()[0].lower()
    small = first in ARTICLES or first in PREPOSITIONS or first in SUBORDINATORS or first in STARTS
    return german[0].lower() + german[1:] if small else german


def test_german_phrase_article_adjective_and_noun_agree(pairs):
    count = 0
    for _, german, _ in pairs:
        for match in NOUN_PHRASE.finditer(lower_first(german)):
            assert phrase_readings(match), (match[0], german)
            count += 1
    assert count > 2 * len(pairs)


def test_german_place_is_accusative_for_into_and_otherwise_dative(pairs):
    for english, german, _ in pairs:
        cases = [
            {reading[:3] for reading in phrase_readings(match)} - {"nom", "gen"}
            for match in NOUN_PHRASE.finditer(lower_first(german))
            if match["preposition"] and match["before"] in ARTICLES
        ]
        assert all(len(case) == 1 for case in cases), german
        assert not re.search(r"\bin dem ", lower_first(german)), german  # contracted to im
        directions = len(re.findall(r"\binto (?![A-Z])", english))  # not "into Mila's house", which has no article
        assert cases.count({"acc"}) == directions, german


FINITE = {"hat", "haben", "ist", "sind", "kann", "können", "muss", "müssen", "darf", "dürfen", "soll", "sollen"}
FINITE |= {"wird", "werden"}
VERB_LAST = set(FINITE)
for entry in VERB_LIST:
    plural_past = entry.past + ("n" if entry.past.endswith("e") else "en")
    forms = {entry.third, entry.de, entry.past, plural_past}
    FINITE |= forms
    VERB_LAST |= {entry.prefix + form for form in forms}


def segments(german):
    """Return the parts between commas as lists of words."""
    return [part.split() for part in lower_first(german).removesuffix(".").split(", ")]


def relative_segment(parts):
    """Return the index of the relative clause: the first part that begins with a relative pronoun."""
    return next(i for i, part in enumerate(parts) if i and part[0] in RELATIVE_PRONOUNS)


def test_german_relative_clauses_are_verb_final_and_agree(pairs):
    adjacent = 0
    for _, german, tree in pairs:
        relatives = tree.count("(WHNP")
        assert relatives <= 1
        if not relatives:
            continue
        parts = segments(german)
        index = relative_segment(parts)
        assert parts[index][-1] in VERB_LAST, german
        last = parts[index - 1][-1]
        if last in NOUN_READINGS:  # otherwise the verb is between noun and pronoun
            genders = {reading[-1] for reading in NOUN_READINGS[last]}
            assert genders & set(RELATIVE_PRONOUNS[parts[index][0]]), german
            adjacent += 1
    assert adjacent > 1_000


SIMPLE_PHRASE = rf"(?:(?:{'|'.join(ARTICLES)}|\d+|[A-Z][a-z]+s) (?:{ADJECTIVE_FORM} )?[A-ZÄÖÜ]\w+|\w+)"
GENITIVE = rf"(?: (?:des|der|dieses|dieser|meines|meiner) (?:{ADJECTIVE_FORM} )?[A-ZÄÖÜ]\w+)?"
PHRASE = f"{SIMPLE_PHRASE}{GENITIVE}"
TIME = (
    r"heute|gestern|morgen|am \w+|um \d+ Uhr|im Jahr \d+|vor \d+ (?:Tagen|Jahren)|in \d+ Tagen|jeden \w+"
    r"|(?:diese|letzte|nächste) Woche|\d+ Mal"
)
FIRST = re.compile(
    rf"(?:{TIME}|im (?:{ADJECTIVE_FORM} )?\w+{GENITIVE}|(?:in|hinter|neben|vor) {PHRASE}|{PHRASE}(?: und {PHRASE})?) "
    rf"(?P<finite>{'|'.join(sorted(FINITE))})\b"
)


def test_german_clause_verb_is_second_in_main_and_last_in_subordinate(pairs):
    kinds = Counter()
    for _, german, tree in pairs:
        if "(WHNP" in tree or "(CC and) (S" in tree:
            continue  # in these, commas do not mark where a clause begins
        parts = segments(german)
        for index, words in enumerate(parts):
            if words[0] in SUBORDINATORS:
                kinds["subordinate"] += 1
                assert words[-1] in VERB_LAST, german
            elif index and parts[0][0] in SUBORDINATORS:
                kinds["inverted"] += 1
                assert words[0] in FINITE, german
            else:
                kinds["main"] += 1
                assert FIRST.match(" ".join(words).removeprefix("aber ")), german
    assert all(count > 1_000 for count in kinds.values()), kinds
    assert len(kinds) == 3


def test_german_verb_agrees_with_its_subject_in_number(pairs):
    singular = {"hat", "ist", *(verb.third for verb in VERB_LIST)}
    plural = {"haben", "sind", *(verb.de for verb in VERB_LIST)}
    count = Counter()
    for _, german, tree in pairs:
        tags = re.findall(r"\((VBZ|VBP) ", tree)
        if tree.count("(S ") == 1 and tags:
            assert FIRST.match(lower_first(german))["finite"] in (singular if tags == ["VBZ"] else plural), german
            count[tags[0]] += 1
    assert min(count.values()) > 500


WEEKDAYS = {"Monday", "Sunday"}


def test_grammar_copies_names_and_numbers(pairs, roots):
    names = set()
    for (_, german, _), root in zip(pairs, chain(*roots.values()), strict=True):
        tagged = leaves(root)
        copied = [word for tag, word in tagged if tag == "CD" or (tag == "NNP" and word not in WEEKDAYS)]
        names.update(word for word in copied if not word.isdigit())
        bare = [word.rstrip(".,") for word in german.split()]
        for index, (tag, word) in enumerate(tagged):  # a name in the genitive
            if tag == "NNP" and tagged[index + 1][0] == "POS":
                bare[bare.index(word + "s")] = word
        known = set(copied)
        assert Counter(word for word in bare if word in known) == Counter(copied), german
        assert [word for word in bare if word.isdigit() and word not in known] == []
    assert len(names) > 3_000


LEMMA = {form: verb.en for verb in VERB_LIST for form in (verb.en, verb.en_third, verb.en_past, verb.en_participle)}
SINGULAR = {form: noun.en for noun in NOUN_LIST for form in (noun.en, noun.en_plural)}


def children(node, *labels):
    return [child for child in node[1:] if child[0] in labels]


def heads(phrase):
    """Return the head nouns of a noun phrase: none for a name, two for a coordination."""
    inner = children(phrase, "NP")
    if children(phrase, "SBAR") or children(phrase, "CC"):
        return [head for child in inner for head in heads(child)]
    return [SINGULAR[word] for _, word in children(phrase, "NN", "NNS") if word in SINGULAR]


def combinations(node, antecedent=()):
    """Return the (adjective, noun), (subject, verb) and (verb, object) pairs of a tree."""
    found = set()
    if node[0] == "NP":
        found |= {("adjective", adj[1], head) for adj in children(node, "JJ") for head in heads(node)}
    if node[0] == "S" and children(node, "VP"):
        subjects = children(node, "NP")[-1:]
        phrase = children(node, "VP")[0]
        while children(phrase, "VP"):
            phrase = children(phrase, "VP")[0]
        finite = children(phrase, "VB", "VBP", "VBZ", "VBD", "VBN")[0][1]
        verb = " ".join([LEMMA[finite], *(particle[1][1] for particle in children(phrase, "PRT"))])
        fronted_only = antecedent and not subjects
        subject_heads = antecedent if fronted_only else heads(subjects[0])
        objects = [child for child in children(phrase, "NP") if heads(child) or leaves(child)[0][0] == "NNP"]
        object_heads = antecedent if antecedent and subjects else heads(objects[-1]) if objects else []
        found |= {("subject", head, verb) for head in subject_heads}
        found |= {("object", verb, head) for head in object_heads}
    for child in node[1:]:
        if isinstance(child, str):
            continue
        relative = child[0] == "SBAR" and children(child, "WHNP")
        inherited = heads(node) if relative else antecedent if node[0] == "SBAR" else ()
        found |= combinations(child, inherited)
    return found


def test_held_out_pairs_are_in_every_test_sentence_and_never_in_training(roots):
    seen = {split: [combinations(root) for root in trees] for split, trees in roots.items()}
    trained = set().union(*seen["train"])
    assert all(combination - trained for combination in seen["test"])
    # The training corpus is not just too small: it has nearly all pairs of the validation split.
    validated = [pair for sentence in seen["valid"] for pair in sentence]
    assert sum(pair in trained for pair in validated) > 0.99 * len(validated)


def test_corpus_test_words_all_occur_in_training(corpus):
    for side in (0, 1):
        words = {split: set() for split in corpus[0]}
        for split, lines in corpus[0].items():
            for pair in lines:
                names = re.findall(r"\(NNP (\w+)\)", pair[2])
                copied = {*names, *(name + "s" for name in names)}
                words[split] |= {word.lower() for word in re.findall(r"[^\W\d]+", pair[side]) if word not in copied}
        assert words["test"] <= words["train"]
        assert len(words["test"]) > 300
