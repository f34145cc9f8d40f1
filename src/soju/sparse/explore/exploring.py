"""What one or two models make of a text: terms, hits, and why. What ``soju explore`` asks."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soju.core.errors import UserError
from soju.report.run_contents import Expansion, Hit, MatchedTerm, Search
from soju.search.index import SparseIndex
from soju.sparse.encoders import TermEncoder
from soju.sparse.expected_terms import TermsOf, terms_of
from soju.sparse.explore.answers import (
    Expansions,
    LanguageShare,
    ModelExpansion,
    ModelSearch,
    PassagePart,
    Searches,
    ShownHit,
    ShownMatch,
    ShownTerm,
)
from soju.sparse.explore.app import ModelLabel
from soju.sparse.indexing import expand, open_model, search_index
from soju.sparse.static.static_encoder import StaticEncoder

MAX_TERMS = 200
"""Heaviest terms of a text that are sent to the page."""
HITS = 10
_STATIC_NOTE = "Weights count occurrences and translations; an index multiplies them with its idf."
_HANGUL = "\u1100-\u11ff\u3130-\u318f가-힣"
_WORD = re.compile(rf"[{_HANGUL}]+|[^\W{_HANGUL}]+")
"""A run of Hangul, or of other letters and digits: ``AI를`` is two, so that each can be marked alone."""


@dataclass(frozen=True)
class ExploredModel:
    """A model, and the index that was made with it."""

    name: str
    encoder: TermEncoder
    terms_of: TermsOf
    """From texts to the ids of the terms that stand in them."""
    index: SparseIndex | None = None

    def names_in(self, texts: Sequence[str]) -> list[set[str]]:
        """Name the terms that stand in each text, unexpanded."""
        names = self.encoder.terms
        # A space before, because byte-level vocabularies spell the start of a word with it.
        return [{names[term] for term in terms} for terms in self.terms_of([f" {text}" for text in texts])]

    @property
    def label(self) -> ModelLabel:
        """Say on the page what this is."""
        index = self.index
        size = "" if index is None else f"{index.documents:,} documents, {index.chunks:,} passages"
        return ModelLabel(self.name, size, _STATIC_NOTE if isinstance(self.encoder, StaticEncoder) else "")


def open_models(model: str, *, against: str | None = None, indexes: Sequence[Path] = ()) -> list[ExploredModel]:
    """Load one or two models and give each its index.

    Args:
        model: See `soju.sparse.indexing.open_model`.
        against: A second one.
        indexes: At most one of each model, in any order.

    Returns:
        The models in the order given.

    Raises:
        UserError: If there is no such model or index, an index was made with another model, or two with the same.
    """
    names = [model] if against is None else [model, against]
    loaded = [(name, *open_model(name)) for name in names]
    opened: dict[str, SparseIndex] = {}
    for folder in indexes:
        index = SparseIndex.open(folder)
        made_with = index.description.fingerprint
        if made_with not in {fingerprint for _, _, fingerprint in loaded}:
            raise UserError(
                f"{folder}: was made with another model than {' or '.join(names)}; "
                f"index the corpus again with one of them, or explore {folder / 'model'}"
            )
        if made_with in opened:
            raise UserError(f"{folder}: a second index of the same model; give one index a model")
        opened[made_with] = index
    return [
        ExploredModel(name, encoder, terms_of(encoder), opened.get(fingerprint))
        for name, encoder, fingerprint in loaded
    ]


class Explorer:
    """Answers the page's questions, one text at a time: tokenizers may not be called from two threads at once."""

    def __init__(self, models: Sequence[ExploredModel]) -> None:
        self._models = tuple(models)
        self._lock = threading.Lock()

    @property
    def searches(self) -> bool:
        """Tell whether any model has an index."""
        return any(model.index is not None for model in self._models)

    def expand(self, text: str) -> Expansions:
        """Say what each model lights up for a text, and which terms only it does."""
        with self._lock:
            found = [expand(model.encoder, [text], k=len(model.encoder.terms))[0] for model in self._models]
            own = [model.names_in([text])[0] for model in self._models]
        names = [{term.term for term in expansion.terms} for expansion in found]
        return Expansions(
            text=text,
            models=tuple(
                _shown_expansion(model.name, expansion, own[place], _others(names, place))
                for place, (model, expansion) in enumerate(zip(self._models, found, strict=True))
            ),
        )

    def search(self, text: str) -> Searches:
        """Say what each model with an index finds for a text, and why."""
        with self._lock:
            searching = [(model, model.index) for model in self._models if model.index is not None]
            found = [search_index(index, model.encoder, [text], k=HITS)[0] for model, index in searching]
            ids = [{hit.document_id for hit in search.hits} for search in found]
            return Searches(
                text=text,
                models=tuple(
                    ModelSearch(model=model.name, hits=_shown_hits(model, found[place], _others(ids, place)))
                    for place, (model, _) in enumerate(searching)
                ),
            )


def passage_parts(passage: str, matched: Sequence[MatchedTerm], terms_in: Mapping[str, set[str]]) -> list[PassagePart]:
    """Cut a passage where its matched terms stand.

    Args:
        passage: The text that was found.
        matched: Terms it shares with the query.
        terms_in: Names of the terms in each word of the passage; see `words_of`.

    Returns:
        Parts that joined are the passage. In a run of Hangul only the term itself is marked where it can be seen
        (혈관 of 혈관이), elsewhere the whole word (vessels for vessel).
    """
    by_name = {term.term: term for term in matched}
    total = sum(term.contribution for term in matched) or 1.0
    parts: list[PassagePart] = []
    end = 0
    for start, stop, term in _spans(passage, by_name, terms_in):
        if start > end:
            parts.append(PassagePart(text=passage[end:start]))
        share = term.contribution / total
        parts.append(PassagePart(text=passage[start:stop], term=term.term, language=term.language, share=share))
        end = stop
    if end < len(passage):
        parts.append(PassagePart(text=passage[end:]))
    return parts


def words_of(passage: str) -> list[str]:
    """Return the runs of letters and digits of a passage."""
    return _WORD.findall(passage)


def _spans(
    passage: str, by_name: Mapping[str, MatchedTerm], terms_in: Mapping[str, set[str]]
) -> Iterator[tuple[int, int, MatchedTerm]]:
    for word in _WORD.finditer(passage):
        terms = [by_name[name] for name in terms_in.get(word.group(), ()) if name in by_name]
        if not terms:
            continue
        # The heaviest term of a word names it; equal ones by name, so that a page looks the same twice.
        term = min(terms, key=lambda item: (-item.contribution, item.term))
        place = word.group().find(term.term.strip("…")) if term.language == "ko" else -1
        if place < 0:
            yield *word.span(), term
        else:
            yield word.start() + place, word.start() + place + len(term.term.strip("…")), term


def _shown_expansion(name: str, expansion: Expansion, own: set[str], others: set[str] | None) -> ModelExpansion:
    total = sum(term.weight for term in expansion.terms)
    weights: dict[str, list[float]] = {}
    for term in expansion.terms:
        weights.setdefault(term.language, []).append(term.weight)
    return ModelExpansion(
        model=name,
        active_terms=len(expansion.terms),
        languages=tuple(
            LanguageShare(language=language, terms=len(weights[language]), share=sum(weights[language]) / total)
            for language in ("ko", "en", "other")
            if language in weights
        ),
        terms=tuple(
            ShownTerm(
                term=term.term,
                language=term.language,
                weight=term.weight,
                in_text=term.term in own,
                only_here=others is not None and term.term not in others,
            )
            for term in expansion.terms[:MAX_TERMS]
        ),
    )


def _shown_hits(model: ExploredModel, found: Search, others: set[str] | None) -> tuple[ShownHit, ...]:
    (own,) = model.names_in([found.query])
    words = sorted({word for hit in found.hits for word in words_of(hit.passage)})
    terms_in = dict(zip(words, model.names_in(words), strict=True)) if words else {}
    return tuple(_shown_hit(hit, own, terms_in, others) for hit in found.hits)


def _shown_hit(hit: Hit, own: set[str], terms_in: Mapping[str, set[str]], others: set[str] | None) -> ShownHit:
    return ShownHit(
        rank=hit.rank,
        document_id=hit.document_id,
        score=hit.score,
        passage=hit.passage,
        matched=tuple(ShownMatch(**term.model_dump(), in_query=term.term in own) for term in hit.matched),
        parts=tuple(passage_parts(hit.passage, hit.matched, terms_in)),
        only_here=others is not None and hit.document_id not in others,
    )


def _others(sets: Sequence[set[str]], place: int) -> set[str] | None:
    """Join all sets but one; none when there is no other."""
    others = [items for other, items in enumerate(sets) if other != place]
    return set().union(*others) if others else None
