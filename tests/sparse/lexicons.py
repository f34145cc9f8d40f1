"""A small Korean–English lexicon for the tests, analysed by hand so that no analyser is loaded."""

from soju.sparse.static.lexicon import LexiconCounts, Stretch, build_tokenizer

KOREAN = [
    "검색|검색 엔진|엔진 을 만든다|만들다",
    "검색|검색 이 빠르|빠르다 다",
    "엔진|엔진 이 좋|좋다 다",
    "검색|검색 을 했|하다 다",
    "네트워크|네트워크 를 만든다|만들다",
    "좋|좋다 은 네트워크|네트워크",
]
ENGLISH = [
    "Don't use the API",
    "the search engine and the networks",
    "a network of search engines",
    "an image and an imagination",
]


def stretches_of(marked):
    """Read ``surface|word`` marks divided by white space; returns the text without spaces and its stretches."""
    text, stretches = "", []
    for mark in marked.split():
        surface, *words = mark.split("|")
        stretches.append(Stretch(len(text), len(text) + len(surface), tuple(words)))
        text += surface
    return text, stretches


def small_counts(*, repeats=3):
    counts = LexiconCounts()
    for _ in range(repeats):
        for marked in KOREAN:
            counts.add_korean(*stretches_of(marked))
        for text in ENGLISH:
            counts.add_latin(text)
    return counts


def small_tokenizer():
    return build_tokenizer(small_counts(), sub_words=100)
