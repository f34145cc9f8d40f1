from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soju.search.chunking import ChunkSettings, chunk_text

TEXTS = st.text(alphabet=st.sampled_from("가나다 ab.!?\n。\u3000\ud800é"), max_size=400)


def test_a_short_text_is_one_chunk():
    assert [chunk.text for chunk in chunk_text("소주는 증류주다.")] == ["소주는 증류주다."]
    assert [(chunk.start, chunk.end) for chunk in chunk_text("")] == [(0, 0)]


def test_chunks_end_at_sentences_and_repeat_one():
    text = "하나 둘 셋. 넷 다섯. Six seven! Eight nine ten."
    chunks = chunk_text(text, ChunkSettings(words=5))
    assert [chunk.text for chunk in chunks] == [
        "하나 둘 셋. 넷 다섯. ",
        "넷 다섯. Six seven! ",
        "Six seven! Eight nine ten.",
    ]


@given(text=TEXTS, words=st.integers(1, 8), characters=st.integers(2, 40), overlap=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_offsets_restore_the_text_and_limits_hold(text, words, characters, overlap):
    chunks = chunk_text(text, ChunkSettings(words=words, characters=characters, overlap_sentences=overlap))
    covered = 0
    for chunk in chunks:
        assert text[chunk.start : chunk.end] == chunk.text
        assert chunk.start <= covered
        assert chunk.end > covered or not text
        assert len(chunk.text) <= characters
        assert len(chunk.text.split()) <= words
        covered = chunk.end
    assert covered == len(text)


@given(text=TEXTS, words=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_chunks_without_overlap_join_to_the_text(text, words):
    chunks = chunk_text(text, ChunkSettings(words=words, characters=30, overlap_sentences=0))
    assert "".join(chunk.text for chunk in chunks) == text


@pytest.mark.parametrize("text", ["가" * 1_000_000, "a b " * 250_000, "。" * 100_000, "\n" * 100_000])
def test_a_huge_text_without_sentences_is_cut(text):
    chunks = chunk_text(text)
    assert max(len(chunk.text) for chunk in chunks) <= 1200
    assert chunks[-1].end == len(text)
