"""A model in the formats of other programs, and the tables that any program reads. What ``soju export`` does.

Shape letters: B = texts, V = terms in the vocabulary; the tokenizer's pieces are as many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from soju.core.errors import DataError, Problem, UserError
from soju.core.files import atomic_writer
from soju.core.language import language_of
from soju.search.folder import idf
from soju.search.remote import escape_token
from soju.sparse.export import Format
from soju.sparse.model import TermEncoder
from soju.sparse.static.encoder import StaticEncoder

FORMATS: dict[Format, str] = {
    "tsv": "a file of source, target and weight",
    "query-tokens": "a JSONL file of the weighted terms of every piece, for OpenSearch and its kin",
    "stock-static": "a SparseEncoder folder of the unexpanded side: one weight a piece",
    "low-rank": "a SparseEncoder folder of the expanded side, approximate",
    "onnx": "a folder for onnxruntime: a graph that ends in the heaviest terms",
    "inference-free": "a SparseEncoder folder whose queries are looked up in an idf table",
}


def export(
    encoder: TermEncoder, target: Path, form: Format, *, prior_documents: float = 10_000, hidden_size: int = 512
) -> None:
    """Write one format of a static model.

    Args:
        encoder: The model.
        target: File or folder, must not exist.
        form: One of `FORMATS` but ``onnx``, which is `export_graph`, and ``inference-free``, which is
            `soju.sparse.export.stock.make_inference_free`.
        prior_documents: Weight of the training text in the idf that query weights carry outside an index of ours.
        hidden_size: Width of the low-rank form.

    Raises:
        UserError: If the target exists, or the model is a neural one, which is in its stock form already.
    """
    _refuse_taken(target)
    if not isinstance(encoder, StaticEncoder):
        raise UserError(
            "a neural model is saved as sentence-transformers loads it; copy its folder, "
            "or use --to onnx or inference-free"
        )
    if form == "tsv":
        write_term_table(target, encoder.translations_VV, encoder.terms)
    elif form == "query-tokens":
        idf_V = training_idf(encoder, prior_documents)
        write_token_table(target, encoder.query_VV, encoder.pieces, encoder.terms, idf_V=idf_V)
    elif form == "stock-static":
        from soju.sparse.export.stock import own_term_weights, save_stock_static

        weights_V = own_term_weights(encoder.canonical_VV, training_idf(encoder, prior_documents))
        save_stock_static(target, encoder.tokenizer, weights_V)
    else:
        from soju.sparse.export.stock import factorise_codes, save_low_rank

        save_low_rank(target, factorise_codes(encoder.query_VV, hidden_size=hidden_size), encoder.tokenizer)


def export_graph(
    encoder: TermEncoder, target: Path, *, top_terms: int = 128, int8: bool = False, fingerprint: str
) -> dict[str, Any]:
    """Write a neural model as an ONNX graph that ends in the heaviest terms.

    Args:
        encoder: The model; its weights become float32.
        target: Folder, must not exist.
        top_terms: Terms to keep of each text.
        int8: Also write a graph with int8 weights.
        fingerprint: What names the model, see `soju.sparse.model.fingerprint_of`.

    Returns:
        What was written and measured, see `soju.sparse.export.onnx.export_onnx`.

    Raises:
        UserError: If the target exists, the model is a static one, or the graph differs from it.
    """
    _refuse_taken(target)
    if isinstance(encoder, StaticEncoder):
        forms = ", ".join(form for form in FORMATS if form not in ("onnx", "inference-free"))
        raise UserError(f"a static model has no network to export as a graph; choose --to {forms}")
    from soju.sparse.export.onnx import OnnxSource, export_onnx
    from soju.sparse.neural_encoders import NeuralEncoder

    assert isinstance(encoder, NeuralEncoder)
    model = encoder.model.float()
    source = OnnxSource(
        model=model[0].model,
        tokenizer=model.tokenizer,
        encode=model.encode_sparse,
        terms=encoder.terms,
        max_length=model[0].max_seq_length,
        activations=2 if model[1].activation_function == "log1p_relu" else 1,
        about={
            "prompt": model.prompts.get(model.default_prompt_name or "", ""),
            "similarity": model.similarity_fn_name,
            "source_sha256": fingerprint,
        },
    )
    return export_onnx(target, source, k=top_terms, int8=int8)


def _refuse_taken(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: exists already; give another name or remove it first")


def training_idf(encoder: StaticEncoder, prior_documents: float) -> NDArray[np.float32]:
    """Return the idf of the training text alone, ``(V,)``, of at least one document: there is no index to count yet."""
    none_V = np.zeros(len(encoder.terms), np.int64)
    return idf(none_V, 0, prior_documents=max(prior_documents, 1.0), prior_share_V=encoder.document_share_V)


MAX_WEIGHT = 64.0
"""Largest query weight Lucene's ``FeatureField.newLinearQuery`` takes, so the bound of every exported weight."""
DECIMALS = 6
"""Weights are rounded to this many decimals; one that rounds to 0 is left out."""


def query_tokens(
    ids: Sequence[str],
    texts: Sequence[str],
    vectors_BV: csr_array,
    terms: Sequence[str],
    *,
    idf_V: NDArray[np.floating[Any]] | None = None,
    max_weight: float = MAX_WEIGHT,
) -> Iterator[dict[str, Any]]:
    """Yield ``{"id", "text", "query_tokens": {token: weight}, "scale"}`` for each query, heaviest token first.

    A weight is the vector's weight × idf × ``scale``. ``scale`` is 1 unless the heaviest token would exceed
    `max_weight`; then the whole query is scaled down to it, which leaves the order of its results as it is.

    Args:
        ids: Id of each query, ``B``.
        texts: The queries, ``B``.
        vectors_BV: Their term weights, ``(B, V)``, finite, >= 0.
        terms: Name of every term, ``V``.
        idf_V: Multiplied in, ``(V,)``, in nats, finite, >= 0. None when the index applies its own or needs none.
        max_weight: Largest weight to write, in (0, 64].

    Yields:
        One object a query.

    Raises:
        UserError: If sizes differ, a weight is negative or not finite, or two terms share a name.
    """
    if not len(ids) == len(texts) == vectors_BV.shape[0]:
        raise UserError(
            f"{len(ids)} ids, {len(texts)} texts and {vectors_BV.shape[0]} vectors; give one of each a query"
        )
    weighted_BV = _weighted(vectors_BV, terms, idf_V, max_weight)
    tokens = [escape_token(term) for term in terms]
    for row, (query, text) in enumerate(zip(ids, texts, strict=True)):
        weights, scale = _row(weighted_BV, row, tokens, max_weight)
        yield {"id": query, "text": text, "query_tokens": weights, "scale": scale}


def write_token_table(
    path: Path,
    weights_VV: csr_array,
    pieces: Sequence[str],
    terms: Sequence[str],
    *,
    idf_V: NDArray[np.floating[Any]] | None = None,
    max_weight: float = MAX_WEIGHT,
) -> int:
    """Write ``{piece: {token: weight}}``, one piece a line, for use at query time with the tokenizer alone.

    To expand a query: tokenize it, add up the objects of its pieces. Pieces without terms have no line. Keys inside are
    escaped tokens (`escape_token`); the piece is as the tokenizer spells it. All weights share one scale.

    Args:
        path: Replaced as a whole when the last line is written.
        weights_VV: Terms of each piece, ``(V, V)``, finite, >= 0.
        pieces: The tokenizer's pieces, ``V``.
        terms: Name of every term, ``V``.
        idf_V: Multiplied in, ``(V,)``, in nats, finite, >= 0.
        max_weight: Largest weight allowed, in (0, 64].

    Returns:
        Number of lines.

    Raises:
        UserError: As `query_tokens`, or if a weight exceeds `max_weight`: rows scaled apart could not be added up.
    """
    if len(pieces) != weights_VV.shape[0]:
        raise UserError(f"{len(pieces):,} pieces for a matrix of {weights_VV.shape}; give one for each row")
    weighted_VV = _weighted(weights_VV, terms, idf_V, max_weight)
    if weighted_VV.nnz and (heaviest := float(weighted_VV.data.max())) > max_weight:
        raise UserError(f"a weight of {heaviest:g} exceeds {max_weight:g}; divide idf_V by {heaviest / max_weight:.3g}")
    tokens = [escape_token(term) for term in terms]
    rows = ({piece: _row(weighted_VV, row, tokens, max_weight)[0]} for row, piece in enumerate(pieces))
    return _write_lines(path, (row for row in rows if any(row.values())))


def _weighted(
    vectors: csr_array, terms: Sequence[str], idf_V: NDArray[np.floating[Any]] | None, max_weight: float
) -> csr_array:
    size = len(terms)
    if vectors.shape[1] != size or (idf_V is not None and idf_V.shape != (size,)):
        idf_shape = None if idf_V is None else idf_V.shape
        raise UserError(f"{size:,} names, vectors of {vectors.shape} and idf of {idf_shape}: give one of each a term")
    if len(set(terms)) != size:
        raise UserError("two terms have the same name, so their weights would be mixed; make the names different")
    if not 0 < max_weight <= MAX_WEIGHT:
        raise UserError(f"max_weight is {max_weight:g}; it must lie in (0, {MAX_WEIGHT:g}]")
    weighted = csr_array(vectors.astype(np.float64))
    weighted.sum_duplicates()
    if idf_V is not None:
        weighted.data *= idf_V[weighted.indices]
    if not (np.isfinite(weighted.data) & (weighted.data >= 0)).all():
        raise UserError("a weight is negative or not finite, which the engines refuse; look at the vectors and the idf")
    return weighted


def _row(weighted: csr_array, row: int, tokens: Sequence[str], max_weight: float) -> tuple[dict[str, float], float]:
    start, stop = weighted.indptr[row : row + 2]
    weights = weighted.data[start:stop]
    scale = min(1.0, max_weight / weights.max(initial=max_weight))
    rounded = np.minimum(np.round(weights * scale, DECIMALS), max_weight)
    order = np.lexsort((weighted.indices[start:stop], -rounded))
    found = {tokens[weighted.indices[start + at]]: float(rounded[at]) for at in order if rounded[at] > 0}
    return found, float(scale)


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with atomic_writer(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


HEADER = ("source", "source_language", "target", "target_language", "weight")

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_TRANSLATION = str.maketrans(_ESCAPES)


def write_term_table(
    path: Path,
    weights_VV: csr_array,
    terms: Sequence[str],
    *,
    language: Callable[[str], str] = language_of,
) -> int:
    r"""Write every non-zero weight as one line ``source, source_language, target, target_language, weight``.

    Lines are sorted by source (code point order), then by falling weight, then by target. A backslash, tab, line
    feed or carriage return in a name becomes two characters: ``\\``, ``\t``, ``\n``, ``\r``. Weights are the shortest
    decimals that read back as the same float32.

    Args:
        path: Replaced as a whole when the last line is written.
        weights_VV: Row = source, column = target, ``(V, V)``, unitless.
        terms: Name of every term, ``V`` different strings.
        language: Tells the language of a name.

    Returns:
        Number of lines below the header.

    Raises:
        UserError: If the names do not fit the matrix or two terms share a name.
    """
    _check_names(weights_VV, terms)
    table = coo_array(weights_VV)
    weights = table.data.astype(np.float32)
    rank_V = np.empty(len(terms), np.int64)
    rank_V[sorted(range(len(terms)), key=terms.__getitem__)] = np.arange(len(terms))
    order = np.lexsort((rank_V[table.col], -weights, rank_V[table.row]))
    cells = [f"{_escape(term)}\t{language(term)}" for term in terms]
    count = 0
    with atomic_writer(path) as file:
        file.write("\t".join(HEADER) + "\n")
        for source, target, weight in zip(table.row[order], table.col[order], weights[order], strict=True):
            if weight != 0:
                file.write(f"{cells[source]}\t{cells[target]}\t{np.format_float_positional(weight, trim='-')}\n")
                count += 1
    return count


def read_term_table(path: Path, terms: Sequence[str]) -> csr_array:
    """Read what `write_term_table` wrote."""
    ids = {term: index for index, term in enumerate(terms)}
    if len(ids) != len(terms):
        raise UserError("two terms have the same name, so a name does not tell the id; make the names different")
    entries: list[tuple[int, int, float]] = []
    problems: list[Problem] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        try:
            if len(cells) != len(HEADER):
                raise ValueError(f"{len(cells)} cells instead of {len(HEADER)}")
            entries.append((ids[_unescape(cells[0])], ids[_unescape(cells[2])], float(cells[4])))
        except KeyError as error:
            problems.append(Problem(str(path), number, "", f"unknown term {error}", "use the model's names", "unknown"))
        except ValueError as error:
            problems.append(Problem(str(path), number, "", str(error), "write the table again", "malformed"))
    if problems:
        raise DataError(problems)
    rows, columns, weights = zip(*entries, strict=True) if entries else ((), (), ())
    data: NDArray[np.float32] = np.array(weights, np.float32)
    table = coo_array((data, (np.array(rows, np.int64), np.array(columns, np.int64))), shape=(len(terms), len(terms)))
    return csr_array(table)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n")
        if header != (expected := "\t".join(HEADER)):
            raise UserError(f"{path}:1: the header is {header!r}, expected {expected!r}; write the table again")
        for number, line in enumerate(file, start=2):
            yield number, line.rstrip("\n")


def _check_names(weights_VV: csr_array, terms: Sequence[str]) -> None:
    if weights_VV.shape != (len(terms), len(terms)):
        raise UserError(
            f"{len(terms):,} names for a matrix of {weights_VV.shape}; give one name for each row and column"
        )
    if len(set(terms)) != len(terms):
        raise UserError("two terms have the same name, so the table could not be read back; make the names different")


def _escape(name: str) -> str:
    return name.translate(_TRANSLATION)


def _unescape(cell: str) -> str:
    characters = iter(cell)
    result = []
    for character in characters:
        if character == "\\":
            escape = next(characters, "")
            if escape not in _CHARACTERS:
                raise ValueError(f"unknown escape \\{escape}")
            character = _CHARACTERS[escape]
        result.append(character)
    return "".join(result)
