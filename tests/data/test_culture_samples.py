import json
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "src" / "soju" / "samples"
LANGUAGES = ("ko", "en")
CATEGORIES = ("tradition", "history", "food", "geography", "modern")
PER_CATEGORY = 40
IDS = [f"{category}_{number:03d}" for category in CATEGORIES for number in range(1, PER_CATEGORY + 1)]
FIELDS = ("id", "category", "query", "knowledge", "answer", "paraphrases", "facts")
HANGUL = re.compile("[가-힣]")
SOURCE_LINE = re.compile(r"- (?P<id>[a-z]+_\d{3}): (?P<sources>.+)")


def read_rows(name):
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def questions_of(row):
    return [row["query"], *row["paraphrases"]]


def letters(text):
    return re.sub(r"\W", "", unicodedata.normalize("NFC", text).lower())


def trigrams(text):
    run = letters(text)
    return {run[start : start + 3] for start in range(len(run) - 2)}


def alike(one, other):
    """Share of the letter trigrams of two texts that both have."""
    return len(trigrams(one) & trigrams(other)) / len(trigrams(one) | trigrams(other))


def holds(text, fact):
    return any(alternative in text for alternative in fact.split("|"))


def fact_faults(row, fact):
    alternatives = fact.split("|")
    checks = {
        f"{fact} has an empty or a repeated alternative": not all(alternatives)
        or len(set(alternatives)) != len(alternatives),
        f"the answer lacks {fact}": not holds(row["answer"], fact),
        f"the knowledge lacks {fact}": not holds(row["knowledge"], fact),
        f"a question gives {fact} away": any(holds(text.lower(), fact.lower()) for text in questions_of(row)),
        f"{fact} is a bare number that turns up by chance": any(re.fullmatch(r"[\d.]{1,3}", a) for a in alternatives),
    }
    return [fault for fault, found in checks.items() if found]


def faults_of(row):
    """What is wrong with one row, in words; nothing for a good row."""
    if tuple(row) != FIELDS:
        return [f"fields are {tuple(row)}"]
    texts = [row["knowledge"], row["answer"], *questions_of(row), *row["facts"]]
    checks = {
        "a text is empty or has loose white space": any(not text or text != text.strip() for text in texts),
        "not two paraphrases": len(row["paraphrases"]) != 2,
        "no facts": not row["facts"],
        "two wordings are nearly the same": any(alike(*pair) > 0.5 for pair in combinations(questions_of(row), 2)),
    }
    faults = [fault for fault, found in checks.items() if found]
    return faults + [fault for fact in row["facts"] for fault in fact_faults(row, fact)]


def sources_of(text):
    matches = [SOURCE_LINE.fullmatch(line) for line in text.splitlines() if line.startswith("- ")]
    assert all(matches), "a line of the sources is not '- id: source; source'"
    return {match["id"]: match["sources"].split("; ") for match in matches}


def leaks(questions, training_texts):
    """Questions that stand in a training text, letter by letter, whatever the case, spaces and punctuation."""
    corpus = "\n".join(map(letters, training_texts))
    return [question for question in questions if letters(question) in corpus]


@pytest.fixture(scope="module")
def culture():
    return {language: read_rows(f"culture.{language}.jsonl") for language in LANGUAGES}


@pytest.fixture(scope="module")
def general():
    return read_rows("general.jsonl")


@pytest.fixture(scope="module")
def training_texts():
    texts = []
    for path in sorted(SAMPLES.glob("*.train.jsonl")):
        for row in read_rows(path.name):
            texts += [value for value in row.values() if isinstance(value, str)]
            texts += [term["term"] for term in row.get("terms", ())]
    return texts


@pytest.fixture
def row(culture):
    return json.loads(json.dumps(culture["en"][0]))


@pytest.mark.parametrize("name", ["culture.ko.jsonl", "culture.en.jsonl", "general.jsonl"])
def test_file_form(name):
    text = (SAMPLES / name).read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    assert unicodedata.is_normalized("NFC", text)
    assert text == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in read_rows(name))


@pytest.mark.parametrize("language", LANGUAGES)
def test_ids_and_categories_are_aligned_and_in_order(culture, language):
    assert [row["id"] for row in culture[language]] == IDS
    assert all(row["id"] == f"{row['category']}_{row['id'][-3:]}" for row in culture[language])
    assert Counter(row["category"] for row in culture[language]) == dict.fromkeys(CATEGORIES, PER_CATEGORY)


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_are_sound(culture, language):
    assert {row["id"]: faults_of(row) for row in culture[language] if faults_of(row)} == {}


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("answer", "It consists of two suites.", "the answer lacks Botaepyeong"),
        ("knowledge", "Music of the royal shrine.", "the knowledge lacks Botaepyeong"),
        ("query", "Are they Botaepyeong and what else?", "a question gives Botaepyeong away"),
        ("paraphrases", ["One only?"], "not two paraphrases"),
        ("facts", [], "no facts"),
        ("facts", ["Botaepyeong|"], "Botaepyeong| has an empty or a repeated alternative"),
        ("facts", ["22"], "22 is a bare number that turns up by chance"),
        ("answer", "Botaepyeong and Jeongdaeeop. ", "a text is empty or has loose white space"),
    ],
)
def test_a_broken_row_is_found(row, field, value, fault):
    row[field] = value
    assert fault in faults_of(row)


def test_a_paraphrase_that_repeats_the_question_is_found(row):
    row["paraphrases"][1] = row["query"].replace("Which", "What")
    assert faults_of(row) == ["two wordings are nearly the same"]


def test_each_language_is_written_in_its_script(culture):
    for ko, en in zip(culture["ko"], culture["en"], strict=True):
        assert all(HANGUL.search(text) for text in (ko["knowledge"], ko["answer"], *questions_of(ko))), ko["id"]
        assert not any(HANGUL.search(text) for text in questions_of(en)), en["id"]
        assert len(HANGUL.findall(en["knowledge"])) <= 5, en["id"]


def test_a_row_asks_for_as_many_facts_in_both_languages(culture):
    counts = [(len(ko["facts"]), len(en["facts"])) for ko, en in zip(culture["ko"], culture["en"], strict=True)]
    assert [row_id for row_id, (ko, en) in zip(IDS, counts, strict=True) if ko != en] == []


def test_questions_are_distinct_over_all_files(culture, general):
    rows = [row for language in LANGUAGES for row in culture[language]]
    questions = [question for row in rows for question in questions_of(row)] + [row["query"] for row in general]
    assert len(questions) == 2 * 200 * 3 + 40
    assert [text for text, count in Counter(map(letters, questions)).items() if count > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_rows_ask_for_the_same_facts(culture, language):
    rows = culture[language]
    same = [
        (one["id"], other["id"])
        for one, other in combinations(rows, 2)
        if all(holds(other["answer"], fact) for fact in one["facts"])
        and all(holds(one["answer"], fact) for fact in other["facts"])
    ]
    assert same == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_ask_different_questions(culture, language):
    texts = [(row["id"], trigrams(question)) for row in culture[language] for question in questions_of(row)]
    pairs = [
        (one, other)
        for (one, left), (other, right) in combinations(texts, 2)
        if one != other and len(left & right) > 0.45 * len(left | right)
    ]
    assert pairs == []


def test_general_questions(general):
    expected = [f"general_{language}_{number:02d}" for language in ("en", "ko") for number in range(1, 21)]
    assert [row["id"] for row in general] == expected
    for row in general:
        assert tuple(row) == ("id", "language", "query")
        assert row["id"].split("_")[1] == row["language"]
        assert bool(HANGUL.search(row["query"])) == (row["language"] == "ko"), row["id"]
        assert row["query"] == row["query"].strip() != ""


def test_every_row_names_two_sources(culture):
    sources = sources_of((SAMPLES / "culture.sources.md").read_text(encoding="utf-8"))
    assert list(sources) == [row["id"] for row in culture["ko"]]
    for row_id, names in sources.items():
        read = {name.strip() for name in names if name.strip() and "(by title)" not in name}
        assert len(read) >= 2, f"{row_id}: fewer than two sources were read"


def test_a_single_or_nameless_source_is_seen():
    assert sources_of("- food_001: Wikipedia (a.org)") == {"food_001": ["Wikipedia (a.org)"]}
    with pytest.raises(AssertionError, match="a line of the sources"):
        sources_of("- food_001")


def test_the_readme_links_the_sources():
    assert "(culture.sources.md)" in (SAMPLES / "README.md").read_text(encoding="utf-8")


def test_no_training_file_contains_a_question(culture, general, training_texts):
    rows = [row for language in LANGUAGES for row in culture[language]]
    questions = [question for row in rows for question in questions_of(row)] + [row["query"] for row in general]
    assert len(training_texts) > 4000
    assert leaks(questions, training_texts) == []


def test_a_leaked_question_is_found(training_texts):
    taken = max(training_texts, key=len)
    assert leaks([taken.upper() + "?", "Who made the first kite of paper?"], training_texts) == [taken.upper() + "?"]
