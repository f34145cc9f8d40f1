import pytest

from embedding.byte_bpes import byte_bpe, byte_bpe_spec
from soju.core.errors import UserError
from soju.embedding.expansion.byte_bpe import ByteBpe, token_spelling
from soju.embedding.expansion.difference import REASONS, find_candidates

HAN = "한".encode()
BASE = byte_bpe([(HAN[:1], HAN[1:2]), (HAN[:2], HAN[2:])], plain=("나라",))


def donor(*tokens, specials=("<s>",)):
    return byte_bpe(more=tokens, specials=specials, plain=())


def test_korean_tokens_that_the_base_lacks_are_candidates_in_the_order_of_their_ids():
    found = find_candidates(BASE, donor("국", " 한국", "ㅋㅋ"))
    assert found.candidates == tuple(map(token_spelling, ("국", " 한국", "ㅋㅋ")))


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("국".encode()[:2], "not-utf8"),
        ("the", "no-hangul"),
        ("漢字", "no-hangul"),
        ("한", "in-base"),
        ("나라", "in-base"),
        ("우리나라", "holds-added-token"),
        ("\u1112\u1161\u11ab", "not-normal"),
        ("국 국", "split"),
        ("국.", "split"),
        ("국1", "split"),
    ],
)
def test_every_refusal_is_counted_by_its_reason(token, reason):
    found = find_candidates(BASE, donor(token, "국"))
    assert found.candidates == (token_spelling("국"),)
    assert found.refused - find_candidates(BASE, donor("국")).refused == {reason: 1}


def test_candidates_and_refusals_are_all_tokens_of_the_donor():
    found = find_candidates(BASE, giver := donor("국", "한", "the", "국 국"))
    assert len(found.candidates) + found.refused.total() == giver.size
    assert set(found.refused) <= set(REASONS)
    assert found.refused["added-token"] == 1


def test_an_added_token_of_the_donor_is_never_read_as_bytes():
    giver = byte_bpe(more=("국",), specials=(token_spelling("나"),), plain=())
    assert find_candidates(BASE, giver).candidates == (token_spelling("국"),)


def test_a_donor_without_new_korean_is_refused():
    with pytest.raises(UserError, match="no Korean token that pico lacks"):
        find_candidates(BASE, donor("한", "the"))


def test_a_base_that_adds_a_space_is_refused():
    spec = byte_bpe_spec()
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    with pytest.raises(UserError, match="add_prefix_space"):
        find_candidates(ByteBpe.from_spec(spec, name="spaced"), donor("국"))
