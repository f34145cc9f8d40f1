"""Long documents are cut at sentence ends into overlapping passages that fit a vector."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import Field

from soju.core.config import Settings


class ChunkSettings(Settings):
    """How documents are cut into the passages that are indexed."""

    words: int = Field(default=120, ge=1)
    """Most whitespace-separated words in a chunk."""
    characters: int = Field(default=1200, ge=2)
    """Most characters in a chunk; cuts texts without spaces (Thai, Chinese, base64) as well."""
    overlap_sentences: int = Field(default=1, ge=0)
    """Sentences that a chunk repeats from the end of the one before, when they leave room for a new one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A window ``[start, end)`` of a document in characters; `text` is exactly that slice."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    words: int


# A sentence ends after . ! ? … with closing quotes or brackets before white space, after the full-width marks of
# Chinese and Japanese, and at a line break. The white space that follows belongs to the sentence it ends.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’」』)\]]*\s+|[。！？]+[”’」』）]*\s*|\s*\n\s*")
_WORD = re.compile(r"\S+\s*")


def chunk_text(text: str, settings: ChunkSettings | None = None) -> list[Chunk]:
    """Cut `text` into chunks of whole sentences, at most `words` words and `characters` characters each.

    A sentence that is too long alone is cut between words, a word that is too long between characters. Every character
    of the text, white space included, is in at least one chunk; with ``overlap_sentences=0`` in exactly one, so the
    chunks joined give the text back. A text that fits, the empty one included, is one chunk. Time is linear.

    Args:
        text: Any text; Korean and English sentences are told apart by their punctuation alone.
        settings: Limits; the defaults when ``None``.

    Returns:
        At least one chunk, in order of `start`.
    """
    settings = settings or ChunkSettings()
    if len(text) <= settings.characters and len(text.split()) <= settings.words:
        return [Chunk(0, len(text), text)]
    spans = _sentences(text, settings)
    chunks: list[Chunk] = []
    first = 0
    while first < len(spans):
        last = _fill(spans, first, settings)
        start, end = spans[first].start, spans[last - 1].end
        chunks.append(Chunk(start, end, text[start:end]))
        if last == len(spans):
            break
        first = _step_back(spans, first, last, settings)
    return chunks


def _fill(spans: list[_Span], first: int, settings: ChunkSettings) -> int:
    """Return the end of the longest run of spans from `first` that fits; at least one span."""
    words, last = 0, first
    while last < len(spans):
        words += spans[last].words
        too_long = words > settings.words or spans[last].end - spans[first].start > settings.characters
        if too_long and last > first:
            break
        last += 1
    return last


def _step_back(spans: list[_Span], first: int, last: int, settings: ChunkSettings) -> int:
    """Return where the next chunk starts: before `last` by the overlap, unless no new sentence would fit then."""
    for start in range(max(first + 1, last - settings.overlap_sentences), last):
        if _fill(spans, start, settings) > last:
            return start
    return last


def _sentences(text: str, settings: ChunkSettings) -> list[_Span]:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if not ends or ends[-1] != len(text):
        ends.append(len(text))
    spans: list[_Span] = []
    start = 0
    for end in ends:
        words = len(text[start:end].split())
        if words <= settings.words and end - start <= settings.characters:
            spans.append(_Span(start, end, words))
        else:
            spans.extend(_pieces(text, start, end, settings))
        start = end
    return spans


def _pieces(text: str, start: int, end: int, settings: ChunkSettings) -> list[_Span]:
    """Cut one sentence that is too long between words, and a word that is too long between characters."""
    cuts: list[tuple[int, int]] = []
    position = start
    for match in _WORD.finditer(text, start, end):
        # White space before the first word belongs to it.
        while match.end() - position > settings.characters:
            cuts.append((position, position + settings.characters))
            position += settings.characters
        cuts.append((position, match.end()))
        position = match.end()
    while position < end:
        cuts.append((position, min(end, position + settings.characters)))
        position = cuts[-1][1]
    pieces: list[_Span] = []
    for low, high in cuts:
        grown = pieces[-1] if pieces else None
        if grown and grown.words < settings.words and high - grown.start <= settings.characters:
            pieces[-1] = _Span(grown.start, high, grown.words + 1)
        else:
            pieces.append(_Span(low, high, 1))
    return pieces
