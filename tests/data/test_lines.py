from hypothesis import given, settings
from hypothesis import strategies as st

from soju.data.sources import split_lines


def test_lines_end_at_every_kind_of_line_end():
    assert list(split_lines([b"a\nb\r", b"\nc\rd\r\n\ne"], 10)) == [b"a", b"b", b"c", b"d", b"", b"e"]


def test_a_line_beyond_the_limit_is_told_and_the_next_is_read():
    assert list(split_lines([b"aaaa\nbb\nccc", b"c", b"c\ndd"], 3)) == [None, b"bb", None, b"dd"]


@settings(deadline=None, max_examples=500)
@given(
    st.binary(max_size=60).map(lambda data: data.translate(bytes(b"ab\r\n"[code % 4] for code in range(256)))),
    st.data(),
)
def test_where_the_chunks_are_cut_does_not_matter(data, draw):
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
    chunks = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    limit = 4
    expected = [line if len(line) <= limit else None for line in data.splitlines()]
    assert list(split_lines(chunks, limit)) == expected
