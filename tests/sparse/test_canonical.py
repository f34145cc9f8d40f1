import numpy as np
import pytest
from scipy.sparse import csr_array

from fixtures.lexicons import KOREAN, small_counts, small_tokenizer, stretches_of
from soju.sparse.static.lexicon import BOUNDARY, UNKNOWN, PieceReadings, Stretch, canonical_terms, strongest_terms

VOCABULARY = {
    UNKNOWN: 0,
    "검색": 1,
    "을": 2,
    "했": 3,
    "하다": 4,
    "검": 5,
    "▁network▁": 6,
    "▁networks▁": 7,
    "▁net": 8,
    "▁": 9,
    "검색하다": 10,
    "▁network's▁": 11,
    "▁networking▁": 12,
}
NAMES = {index: piece for piece, index in VOCABULARY.items()}


def canonical(*texts, latin=None, **options):
    """Terms of each piece, by name, after reading texts given as piece ids, spans and stretches."""
    readings = PieceReadings(VOCABULARY)
    for text in texts:
        readings.add(*text)
    matrix = canonical_terms(VOCABULARY, readings, latin or {}, **options)
    assert matrix.dtype == np.float32
    assert matrix.shape == (13, 13)
    return {
        NAMES[row]: {NAMES[term]: round(float(weight), 4) for term, weight in zip(*terms, strict=True)}
        for row in range(13)
        if (terms := (matrix[[row]].tocoo().coords[1], matrix[[row]].tocoo().data))
    }


def test_forms_of_an_english_word_share_the_term_named_by_the_commonest():
    terms = canonical(latin={"networks": 9, "network": 3, "network's": 1})
    assert [terms[f"▁{word}▁"] for word in ("network", "networks", "network's", "networking")] == [
        {"▁networks▁": 1.0}
    ] * 4


def test_equally_common_forms_are_named_by_the_shortest():
    assert canonical(latin={"networks": 3, "network": 3})["▁networks▁"] == {"▁network▁": 1.0}


def test_sub_words_keep_themselves_for_a_part_and_the_unknown_piece_and_the_boundary_mean_nothing():
    assert canonical()["▁net"] == {"▁net": 0.5}
    terms = canonical(sub_word_weight=0.25)
    assert terms["▁net"] == {"▁net": 0.25}
    assert terms["▁network▁"] == {"▁network▁": 1.0}
    assert terms[UNKNOWN] == terms["▁"] == {}


def test_function_words_count_for_less_under_the_term_of_their_stem():
    terms = canonical(latin={"network": 2}, function_words={"networks", "the"}, function_word_weight=0.25)
    assert terms["▁networks▁"] == {"▁network▁": 0.25}
    assert terms["▁network▁"] == {"▁network▁": 1.0}


def test_function_words_that_count_for_nothing_leave_no_entry():
    assert canonical(function_words={"network"}, function_word_weight=0)["▁network▁"] == {}


def test_a_particle_means_nothing_and_a_noun_itself():
    terms = canonical(([1, 2], [(0, 2), (2, 3)], [Stretch(0, 2, ("검색",)), Stretch(2, 3, ())]))
    assert terms["을"] == {}
    assert terms["검색"] == {"검색": 1.0}


def test_a_korean_piece_that_was_never_read_keeps_itself():
    assert canonical()["을"] == {"을": 1.0}


def test_a_contracted_form_means_its_verb():
    assert canonical(([3], [(0, 1)], [Stretch(0, 1, ("하다",))]))["했"] == {"하다": 1.0}


def test_a_piece_means_what_it_stood_for_in_proportion():
    read_as_verb = ([3], [(0, 1)], [Stretch(0, 1, ("하다",))])
    read_as_ending = ([3], [(0, 1)], [Stretch(0, 1, ())])
    assert canonical(read_as_verb, read_as_ending, read_as_ending, read_as_ending)["했"] == {"하다": 0.25}


@pytest.mark.parametrize(("others", "terms"), [(9, {"하다": 0.1}), (10, {})])
def test_a_reading_of_less_than_a_tenth_is_dropped(others, terms):
    read_as_verb = ([3], [(0, 1)], [Stretch(0, 1, ("하다",))])
    read_as_ending = ([3], [(0, 1)], [Stretch(0, 1, ())])
    assert canonical(read_as_verb, *[read_as_ending] * others)["했"] == terms


def test_a_piece_that_covers_two_words_means_both():
    compound = ([10], [(0, 4)], [Stretch(0, 2, ("검색",)), Stretch(2, 4, ("하다",))])
    assert canonical(compound)["검색하다"] == {"검색": 1.0, "하다": 1.0}


def test_parts_of_a_word_outside_the_vocabulary_keep_themselves():
    rarer = ([5, 1], [(0, 1), (1, 3)], [Stretch(0, 3, ("검검색",))])
    terms = canonical(rarer)
    assert terms["검"] == {"검": 1.0}
    assert terms["검색"] == {"검색": 1.0}


def test_a_piece_that_a_word_covers_only_partly_keeps_itself_for_that_part():
    """Piece 검색 over ``검`` + particle ``색``: half of it was part of a word."""
    assert canonical(([1], [(0, 2)], [Stretch(0, 1, ("검정",)), Stretch(1, 2, ())]))["검색"] == {"검색": 0.5}


def test_pieces_and_spans_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        PieceReadings(VOCABULARY).add([1, 2], [(0, 2)], [])


def test_the_terms_of_a_real_tokenizer():
    tokenizer = small_tokenizer()
    readings = PieceReadings(tokenizer.get_vocab())
    for marked in KOREAN:
        text, stretches = stretches_of(marked)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        readings.add(encoding.ids, encoding.offsets, stretches)
    matrix = canonical_terms(tokenizer.get_vocab(), readings, small_counts().latin)
    strongest = strongest_terms(matrix)

    def term(piece):
        return tokenizer.id_to_token(int(strongest[tokenizer.token_to_id(piece)]))

    assert [term(piece) for piece in ("했", "만든다", "좋", "빠르")] == ["하다", "만들다", "좋다", "빠르다"]
    assert [term(piece) for piece in ("을", "이", "다")] == [UNKNOWN] * 3
    assert term("▁engine▁") == term("▁engines▁")
    assert term("▁image▁") != term("▁imagination▁")
    assert term(BOUNDARY) == UNKNOWN


def test_the_strongest_term_needs_three_tenths_of_an_occurrence():
    canonical_VV = csr_array(
        np.array(
            [
                [0.0, 0.0, 0.0, 0.0],
                [0.0, 0.2, 0.7, 0.0],  # its largest
                [0.0, 0.0, 0.125, 0.125],  # a quarter in all: seldom a term
                [0.0, 0.25, 0.0, 0.25],  # half in all: a tie goes to the lower id
            ],
            np.float32,
        )
    )
    assert strongest_terms(canonical_VV).tolist() == [0, 2, 0, 1]
    assert strongest_terms(canonical_VV, at_least=0.25).tolist() == [0, 2, 2, 1]
    assert strongest_terms(canonical_VV, at_least=0.75).tolist() == [0, 2, 0, 0]
    assert strongest_terms(canonical_VV).dtype == np.int32
