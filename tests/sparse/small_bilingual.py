"""Twelve sentence pairs and six head words written by hand, and the encoder trained on them."""

from soju.data.rows import PairRow, Term, TermRow
from soju.sparse.config import StaticConfig
from soju.sparse.static.training import train_static

PAIRS = [
    PairRow(ko, en)
    for ko, en in (
        ("백신은 사람을 보호한다", "vaccines protect people"),
        ("백신이 부족하다", "the vaccine is scarce"),
        ("의사가 백신을 찾는다", "a doctor looks for the vaccine"),
        ("의사가 책을 읽는다", "a doctor reads a book"),
        ("학생이 책을 읽는다", "a student reads a book"),
        ("학생이 학교에 갔다", "the student went to school"),
        ("학교가 크다", "the school is big"),
        ("책이 크다", "the book is big"),
        ("사람이 학교에 갔다", "people went to school"),
        ("바다가 크다", "the sea is big"),
        ("사람이 바다에 갔다", "people went to the sea"),
        ("의사가 바다를 찾는다", "a doctor looks for the sea"),
    )
]
TERMS = [
    TermRow("백신", (Term("vaccine", 1.0),)),
    TermRow("학교", (Term("school", 1.0), Term("academy", 0.7))),
    TermRow("책", (Term("book", 1.0), Term("도서", 0.8))),
    TermRow("도서", (Term("book", 0.9),)),
    TermRow("양자", (Term("quantum", 1.0),)),  # in no sentence
    TermRow("추천 시스템", (Term("recommender system", 1.0),)),  # in no sentence
]


def small_config(**alignment):
    return StaticConfig.model_validate(
        {
            "recipe": "splade",
            "mode": "static",
            "name": "small",
            "data": {"pairs": ["unused.tsv"]},
            "tokenizer": {"min_count": 1, "sub_words": 100},
            "alignment": alignment,
        }
    )


def train_small(*, log=None, terms=TERMS, workers=1, **alignment):
    return train_static(PAIRS, terms, small_config(**alignment), log=log, workers=workers)
