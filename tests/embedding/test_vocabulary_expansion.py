from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.byte_bpes import byte_bpe
from soju.core.errors import UserError
from soju.embedding.expansion.byte_bpe import ByteBpe, is_hangul_piece, token_bytes, token_spelling, token_text
from soju.embedding.expansion.merges import (
    Expansion,
    MergeBuilder,
    count_pre_tokens,
    expand_by_added_tokens,
    expand_by_corpus,
    expand_by_merges,
    expanded_spec,
)


def spelled(*texts):
    return [token_spelling(text) for text in texts]


def parts_of(*texts):
    """Return merges that make each character of the texts one token, from its first byte on."""
    merges = {}
    for character in "".join(texts):
        raw = character.encode()
        for end in range(1, len(raw)):
            merges[raw[:end], raw[end : end + 1]] = None
    return list(merges)


def expanded(base, expansion):
    return ByteBpe.from_spec(expanded_spec(base, expansion), name="expanded")


def tokens(tokenizer, text):
    return [
        token_text(token) or token_bytes(token).hex()
        for token in tokenizer.tokenizer.encode(text, add_special_tokens=False).tokens
    ]


SYLLABLES = byte_bpe(parts_of("한국어를"))  # 256 bytes, 한 257, 국 259, 어 261, 를 263, four added tokens, size 268


def test_a_candidate_of_two_old_tokens_is_one_merge():
    expansion = expand_by_merges(SYLLABLES, spelled("한국"))
    assert expansion == Expansion(
        first_id=268,
        tokens=tuple(spelled("한국")),
        merges=(tuple(spelled("한", "국")),),
        decompositions=((257, 259),),
    )
    assert tokens(expanded(SYLLABLES, expansion), "한국어") == ["한국", "어"]
    assert expansion.collapse([268, 261]) == [257, 259, 261]
    assert expansion.size == 269


def test_a_candidate_of_three_old_tokens_needs_an_intermediate_unless_a_part_is_a_candidate():
    alone = expand_by_merges(SYLLABLES, spelled("한국어"))
    assert list(alone.tokens) == spelled("한국", "한국어")
    assert list(alone.intermediates) == spelled("한국")
    both = expand_by_merges(SYLLABLES, spelled("한국어", "국어"))
    assert list(both.tokens) == spelled("국어", "한국어")
    assert both.intermediates == ()
    assert both.decompositions == ((259, 261), (257, 259, 261))


def test_a_base_without_korean_gets_the_first_halves_of_syllables_as_intermediates():
    base = byte_bpe()
    expansion = expand_by_merges(base, spelled("한", "국", "한국"))
    halves = [token_spelling(character.encode()[:2]) for character in "한국"]
    assert list(expansion.tokens) == [halves[0], *spelled("한"), halves[1], *spelled("국", "한국")]
    assert list(expansion.intermediates) == halves
    assert tokens(expanded(base, expansion), "한국") == ["한국"]
    assert expansion.texts == (None, "한", None, "국", "한국")


def test_the_limit_counts_intermediates_and_takes_back_what_does_not_fit():
    expansion = expand_by_merges(byte_bpe(), spelled("한", "국", "핝"), limit=3)
    assert [text for text in expansion.texts if text] == ["한", "핝"]  # 국 needs two tokens, 핝 shares the half of 한
    assert expansion.unreachable == ((token_spelling("국"), "limit"),)
    assert len(expansion.tokens) == 3


def test_intermediates_can_be_capped():
    expansion = expand_by_merges(byte_bpe(), spelled("한", "국"), max_intermediates=1)
    assert expansion.unreachable == ((token_spelling("국"), "intermediates"),)


def test_a_merge_that_would_make_an_old_token_is_refused():
    base = byte_bpe(parts_of("한국어"), more=("한국",))  # 한국 is in the vocabulary, but no merge makes it
    expansion = expand_by_merges(base, spelled("한국어"))
    assert list(expansion.tokens) == spelled("국어", "한국어")
    assert expand_by_merges(base, spelled("한국어"), max_intermediates=0).unreachable == (
        (token_spelling("한국어"), "intermediates"),
    )


def test_a_merge_without_hangul_is_refused_though_a_candidate_wants_it():
    base = byte_bpe(parts_of("한"))
    expansion = expand_by_merges(base, spelled("ab한"))
    assert list(expansion.tokens) == spelled("b한", "ab한")
    japanese = "あ".encode()
    builder = MergeBuilder(base, [])
    first, second = (base.vocabulary[token_spelling(japanese[place : place + 1])] for place in (0, 1))
    assert builder.refusal(first, second) == "not-hangul"


def test_a_token_stands_for_one_old_encoding_as_bpe_never_offers_another():
    # 가나다 is [가나][다] by itself. After 라, the merge of 라 and 가 comes first, and no 가 is left.
    base = byte_bpe([*parts_of("가나다라"), ("라", "가"), ("가", "나"), ("나", "다")])
    assert tokens(base, "가나다") == ["가나", "다"]
    assert tokens(base, "라가나다") == ["라가", "나다"]
    expansion = expand_by_merges(base, spelled("가나다", "라가나다"))
    assert tokens(expanded(base, expansion), "가나다라가나다") == ["가나다", "라가나다"]
    assert [[token_text(list(base.vocabulary)[old]) for old in ids] for ids in expansion.decompositions] == [
        ["가나", "다"],
        ["라가", "나다"],
    ]


def test_undoing_leaves_no_trace():
    base = byte_bpe()
    builder, untouched = MergeBuilder(base, spelled("한")), MergeBuilder(base, spelled("한"))
    lead, second = (base.vocabulary[token_spelling("한".encode()[place : place + 1])] for place in (0, 1))
    builder.append(lead, second)
    assert builder.settle([lead, second]) == [base.size]
    builder.undo(0)
    assert builder.settle([lead, second]) == [lead, second]
    state = {name: value for name, value in vars(builder).items() if isinstance(value, list | dict | int)}
    assert state == {name: vars(untouched)[name] for name in state}


def test_a_corpus_decides_the_order_and_donor_order_completes_it():
    base = byte_bpe(parts_of("한국어를"))
    counts = Counter({"한국어를": 3, "국어": 2, "어를": 4, "the": 99})
    expansion = expand_by_corpus(base, spelled("한국", "국어", "어를", "한국어"), counts)
    # 어를 occurs 7 times, then 한국 3 times; 국어 twice; 한국어를 is [한국][어를] by then, so 한국어 comes last.
    assert list(expansion.texts) == ["어를", "한국", "국어", "한국어"]
    assert tokens(expanded(base, expansion), "한국어를") == ["한국", "어를"]


def test_rare_pairs_are_not_decided_by_the_corpus():
    base = byte_bpe(parts_of("한국어"))
    expansion = expand_by_corpus(base, spelled("한국", "국어"), {"국어": 1}, min_count=2)
    assert list(expansion.texts) == ["한국", "국어"]


def test_a_limit_takes_what_the_corpus_wants_most():
    base = byte_bpe(parts_of("한국어"))
    expansion = expand_by_corpus(base, spelled("한국", "국어"), {"국어": 5, "한국": 4}, limit=1)
    assert list(expansion.texts) == ["국어"]
    assert expansion.unreachable == ((token_spelling("한국"), "limit"),)


def test_a_corpus_makes_no_half_of_a_syllable_that_no_candidate_holds():
    expansion = expand_by_corpus(byte_bpe(), spelled("한", " 국"), {"한뷁": 9, " 국 뷁": 9})
    assert set(expansion.intermediates) == {token_spelling("한".encode()[:2]), token_spelling(" 국".encode()[:3])} | {
        token_spelling("국".encode()[:2])
    }


def test_pre_tokens_without_hangul_are_not_counted():
    counts = count_pre_tokens(byte_bpe(), ["한국어 the 한국어, 국", "\u1112\u1161\u11ab"])
    assert counts == {"한국어": 1, " 한국어": 1, " 국": 1, "한": 1}


def test_added_tokens_are_the_comparison():
    expansion = expand_by_added_tokens(SYLLABLES, spelled("한국", "국어", "어"), limit=2)
    assert expansion.merges == ()
    assert expansion.decompositions == ((257, 259), (259, 261))
    assert expansion.unreachable == ((token_spelling("어"), "limit"),)
    assert tokens(SYLLABLES, "를한국어") == ["를", "한", "국", "어"]
    found = expanded(SYLLABLES, expansion)
    assert next(found.encode(["를한국어"])) == [263, 268, 261]


def test_an_expansion_is_read_back(tmp_path):
    expansion = expand_by_merges(byte_bpe(), spelled("한", "국"), limit=2)
    expansion.save(tmp_path)
    assert Expansion.load(tmp_path) == expansion
    assert Expansion.load(tmp_path / "expansion.json") == expansion


def test_what_is_no_expansion_is_refused(tmp_path):
    with pytest.raises(UserError, match="soju expand"):
        Expansion.load(tmp_path)
    (tmp_path / "expansion.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no expansion"):
        Expansion.load(tmp_path)


ALPHABET = "가각나다라한 "
KOREAN = st.text(ALPHABET, min_size=1, max_size=8)
RAW = "가각나다라한가나다라".encode()


@st.composite
def bases(draw):
    """A base with random merges of Korean bytes, across the edges of characters too, and of neighbours of those."""
    merges, names = [], {bytes([byte]) for byte in set(RAW)}
    for _ in range(draw(st.integers(0, 25))):
        text = draw(st.sampled_from([RAW, "ab가 나b".encode(), " 한라다".encode()]))
        start = draw(st.integers(0, len(text) - 2))
        middle = draw(st.integers(start + 1, len(text) - 1))
        end = draw(st.integers(middle + 1, len(text)))
        left, right = text[start:middle], text[middle:end]
        known = names | {bytes([byte]) for byte in range(256)}
        if left in known and right in known and (left, right) not in merges:
            merges.append((left, right))
            names.add(left + right)
    return byte_bpe(merges)


CANDIDATES = st.lists(
    st.builds(
        lambda space, text: space + text, st.sampled_from(["", " "]), st.text("가각나다라한", min_size=1, max_size=4)
    ),
    min_size=1,
    max_size=8,
    unique=True,
)
OTHERS = st.text("ab 1.,漢字あいカ゚ㄅㆠꀀꥠé\n", max_size=12)


@given(base=bases(), texts=CANDIDATES, documents=st.lists(st.text("가각나다라한 ab.あ漢", max_size=10), max_size=6),
       other=OTHERS, corpus=st.booleans(), limit=st.none() | st.integers(1, 6))  # fmt: skip
def test_every_new_encoding_is_a_coarsening_and_other_languages_keep_their_ids(
    base, texts, documents, other, corpus, limit
):
    candidates = [token for token in spelled(*texts) if token not in base.vocabulary]
    if corpus:
        counts = count_pre_tokens(base, documents * 2)
        expansion = expand_by_corpus(base, candidates, counts, limit=limit)
    else:
        expansion = expand_by_merges(base, candidates, limit=limit)
    found = expanded(base, expansion)
    for text in [*documents, *texts]:
        (old,), (new,) = base.encode([text]), found.encode([text])
        assert expansion.collapse(new) == old
        assert found.decode(new) == text
    assert list(found.encode([other])) == list(base.encode([other])) or any(map(is_hangul_piece, [other.encode()]))
    unreachable = {token for token, _ in expansion.unreachable}
    for candidate in candidates:
        (ids,) = found.encode([token_text(candidate)])
        assert (ids == [found.vocabulary.get(candidate)]) is (candidate not in unreachable)
    assert len(set(expansion.tokens)) == len(expansion.tokens) == len(expansion.decompositions)
    assert limit is None or len(expansion.tokens) <= limit


def slow_bpe(tokenizer, text):
    """Apply merges as BPE is defined: of all neighbours the most urgent, the leftmost first, one at a time."""
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    pieces = list(token_spelling(text))
    while urgent := [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, place = min(urgent)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [tokenizer.vocabulary[piece] for piece in pieces]


@given(base=bases(), texts=CANDIDATES, word=st.text("가각나다라한", min_size=1, max_size=6))
def test_our_merging_is_that_of_the_library_and_of_the_definition(base, texts, word):
    candidates = [token for token in spelled(*texts) if token not in base.vocabulary]
    builder = MergeBuilder(base, candidates)
    expansion = expand_by_merges(base, candidates)
    for left, right in expansion.merges:
        ids = base.vocabulary | builder.new_ids
        builder.append(ids[left], ids[right])
    (old,) = base.encode([word])
    found = expanded(base, expansion)
    ours = builder.settle(list(old))
    assert [ours] == list(found.encode([word]))
    assert ours == slow_bpe(found, word)


def test_prepended_merges_would_be_no_coarsening():
    base = byte_bpe([*parts_of("한국어"), ("국", "어")])
    expansion = expand_by_merges(base, spelled("한국"))
    spec = expanded_spec(base, expansion)
    halves = len(parts_of("한국어"))
    spec["model"]["merges"] = [*base.merges[:halves], *expansion.merges, *base.merges[halves:]]
    wrong = ByteBpe.from_spec(spec, name="prepended")
    (old,), (appended,), (prepended,) = (
        tokenizer.encode(["한국어"]) for tokenizer in (base, expanded(base, expansion), wrong)
    )
    assert expansion.collapse(appended) == appended == old  # [한][국어] stays
    assert expansion.collapse(prepended) != old  # [한국][어]


def test_a_base_that_looks_up_whole_words_first_is_coarsened_too():
    base = byte_bpe(parts_of("한국어"), more=("한국",))  # no merge makes 한국, only looking it up does
    spec = {**base.spec, "model": {**base.spec["model"], "ignore_merges": True}}
    base = ByteBpe.from_spec(spec, name="llama")
    expansion = expand_by_merges(base, spelled("국어", "한국어"))
    found = expanded(base, expansion)
    assert tokens(found, "한국어") == ["한국어"]
    for text in ("한국", "한국어", "어한국어", "한국 국어"):
        (old,), (new,) = base.encode([text]), found.encode([text])
        assert expansion.collapse(new) == old
