import pytest
import torch

from soju.core.errors import UserError
from soju.embedding.expansion.initialise import DonorVectors

VECTORS = torch.arange(1.0, 11.0).reshape(5, 2)
HALF, OTHER_HALF = "가".encode()[:2], "각".encode()[:1]


def match(tokens, base, new, vectors=VECTORS, **options):
    return DonorVectors.match(vectors, tokens, base_tokens=base, new_tokens=new, **options)


def test_anchors_and_new_tokens_are_found_by_their_bytes():
    found = match([b"a", b"bc", "한국".encode(), b"d", None], [b"bc", b"x", b"a", None], ["한국".encode(), b"zz"])
    assert found.anchor_ids_A.tolist() == [0, 2]
    assert found.anchor_AF.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert found.known_N.tolist() == [True, False]
    assert found.new_NF.tolist() == [[5.0, 6.0], [0.0, 0.0]]


def test_parts_of_characters_are_anchors_only_of_themselves():
    assert HALF.decode(errors="replace") == OTHER_HALF.decode(errors="replace") == "\ufffd"
    found = match([HALF, b"a"], [OTHER_HALF, b"a"], [])
    assert found.anchor_ids_A.tolist() == [1]
    assert match([HALF, b"a"], [HALF, b"a"], []).anchor_ids_A.tolist() == [0, 1]


def test_special_tokens_are_no_anchors():
    assert match([None, b"a"], [None, b"a"], []).anchor_ids_A.tolist() == [1]


def test_a_vector_of_zeros_is_none():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = match([b"a", b"b", b"n"], [b"a", b"b"], [b"n"], vectors)
    assert found.anchor_ids_A.tolist() == [1]
    assert found.known_N.tolist() == [False]


def test_the_limit_keeps_the_lowest_ids():
    assert match([b"c", b"b", b"a"], [b"a", b"b", b"c"], [], limit=2).anchor_ids_A.tolist() == [0, 1]


def test_strangers_are_refused():
    with pytest.raises(UserError, match="shares no token"):
        match([b"a"], [b"b"], [])
    with pytest.raises(UserError, match="tokenizer has 6 ids and its model 5 rows"):
        match([b"a"] * 6, [b"a"], [])
