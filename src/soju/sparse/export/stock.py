"""Models in the forms sentence-transformers loads without soju.

Of a static model these are its unexpanded side and, approximately, its expanded one; of a neural model, one whose
queries are looked up.

The expanded side is a BERT without layers. ``SpladePooling`` computes ``sum_i log1p(relu(logit_iv))`` over the pieces i
of a text. With ``logit_iv = u_i · c_v - b_v`` and ``u_i · c_v ≈ expm1(W_iv) + b_v`` where ``W_iv > 0``, and below
``b_v`` elsewhere, that is ``sum_i W_iv``, the exact encoder's product. Such codes exist although W has full rank: the
ReLU cuts the cross-talk. With ``pooling="max"``, the stock default, it is ``max_i W_iv`` instead. What differs from the
exact encoder: texts are cut at a maximum length, and the codes are an approximation; `soju.sparse.export.onnx.fidelity`
measures it.

Shape letters: V = pieces (terms are pieces too), D = hidden size, C = D - 2 code dimensions, N = some pieces,
K = terms of a piece.

References:
    Geng et al. 2024, arXiv:2411.04403 (inference-free sparse retrieval with idf). Formal et al. 2021, arXiv:2109.10086
    (SPLADE-doc).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, TokenizersBackend

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest
from soju.data.log import OnError, ReadLog
from soju.search.folder import idf
from soju.sparse.indexing import read_documents
from soju.sparse.model import load
from soju.sparse.neural_encoders import InferenceFreeEncoder, NeuralEncoder


def stock_tokenizer(tokenizer: Tokenizer, *, max_length: int = 512, start_token: bool = False) -> TokenizersBackend:
    """Wrap a `tokenizers.Tokenizer` so that ``AutoTokenizer`` reloads it with the same pieces and ids.

    Padding uses the unknown piece: a pad token of its own would be one more id, hence one more dimension of every
    vector. Padded places have attention mask 0, so they never count. ``<unk>`` written in a text is cut like any other
    characters (``split_special_tokens``).

    Args:
        tokenizer: A model with an unknown token; it is copied.
        max_length: Pieces after which a text is cut.
        start_token: Put the unknown piece before every text, so that an empty text is not an empty sequence, which
            stock models cannot pool. For models that give the unknown piece no weight.

    Returns:
        A tokenizer to save beside a model.

    Raises:
        UserError: If the tokenizer has no unknown token or `max_length` is below 2.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; it must be 2 or more")
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_token")  # word pieces, words
    if unknown is None and model.get("unk_id") is not None:  # unigrams
        unknown = tokenizer.id_to_token(model["unk_id"])
    if unknown is None or tokenizer.token_to_id(unknown) is None:
        raise UserError("the tokenizer has no unknown token, which padding needs; build it with one")
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if start_token:
        copy.post_processor = TemplateProcessing(
            single=f"{unknown} $A", special_tokens=[(unknown, tokenizer.token_to_id(unknown))]
        )
    return TokenizersBackend(
        tokenizer_object=copy,
        unk_token=unknown,
        pad_token=unknown,
        model_max_length=max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
    )


Floats = NDArray[np.float32]

SLACK = 2
"""Dimensions that give every piece vector mean 0 and variance 1, so that LayerNorm changes nothing."""
PEAK = 1.0
"""The largest weight after scaling; above it ``expm1`` would stretch the range the codes must hold."""


@dataclass(frozen=True)
class CodeSettings:
    """What `factorise_codes` weighs against cross-talk."""

    bias: float
    """Relative to the largest logit of a term, > 0. Cross-talk below it vanishes."""
    ridge: float
    """> 0. A larger one gives smaller norms, hence less cross-talk, and smaller weights."""
    max_terms: int | None = None
    """Keep this many terms of a piece, the heaviest. None keeps all."""


_CODE_SETTINGS = tuple(
    CodeSettings(bias, ridge, max_terms)
    for bias, ridge, max_terms in product((0.5, 1.0, 2.0, 4.0), (0.01, 0.3), (None, 16, 8))
)


@dataclass(frozen=True)
class LowRankFactors:
    """``relu(pieces_VC @ terms_VC.T - bias_V) ≈ expm1(weights / scale)``."""

    pieces_VC: Floats
    terms_VC: Floats
    bias_V: Floats
    scale: float
    """The weights are divided by this, the same for all, so that rankings and cosines do not change."""
    settings: dict[str, float | int | str | None]
    """How the factors were made."""

    def weights(self, pieces_N: NDArray[np.integer[Any]]) -> Floats:
        """Return the weights these pieces give every term, ``(N, V)``, scaled back to the original unit."""
        logits_NV = self.pieces_VC[pieces_N] @ self.terms_VC.T - self.bias_V
        return (np.log1p(np.maximum(logits_NV, 0)) * self.scale).astype(np.float32)


def factorise_codes(
    weights_VV: csr_array,
    *,
    hidden_size: int = 512,
    settings: CodeSettings | None = None,
    piece_counts_V: NDArray[Any] | None = None,
    sample: int = 256,
    seed: int = 0,
) -> LowRankFactors:
    """Give every term a random unit code and every piece the ridge solution for its terms.

    ``u_i = argmin_u sum_{v in terms of i} (u · c_v - a_iv - bias)² + ridge · |u|²`` with a_iv relative to the largest
    ``expm1(weight)`` of term v. A small norm is a small cross-talk: a foreign logit has the standard deviation
    ``|u| / sqrt(C)``, and what stays below the bias vanishes in the ReLU.

    Args:
        weights_VV: Terms of each piece, ``(V, V)``, finite, >= 0.
        hidden_size: D.
        settings: None picks those with the best mean cosine over `sample` pieces.
        piece_counts_V: How often each piece occurs, for the choice of the sample, ``(V,)``. None draws evenly.
        sample: Pieces the choice is made on.
        seed: Seed of the codes and of the sample.

    Returns:
        The factors; those of a piece without terms are 0.

    Raises:
        UserError: If the weights or the settings are unusable.
    """
    targets, scale = _targets(weights_VV, hidden_size)
    generator = np.random.default_rng(seed)
    codes_VC = generator.standard_normal((targets.shape[0], hidden_size - SLACK), dtype=np.float32)
    codes_VC /= np.linalg.norm(codes_VC, axis=1, keepdims=True)
    peaks_V = np.asarray(targets.max(axis=0).todense()).ravel().astype(np.float32)

    def solve(pieces_N: NDArray[np.int64], chosen: CodeSettings) -> LowRankFactors:
        kept = targets if chosen.max_terms is None else _heaviest(targets, chosen.max_terms)
        relative = kept.copy()
        relative.data = relative.data / peaks_V[relative.indices]
        pieces_VC = _ridge(relative, pieces_N, codes_VC, bias=chosen.bias, ridge=chosen.ridge)
        bias_V = np.where(peaks_V > 0, peaks_V, np.float32(1)) * np.float32(chosen.bias)
        made = {"factorisation": "codes", "hidden_size": hidden_size, "seed": seed, **asdict(chosen)}
        return LowRankFactors(pieces_VC, codes_VC * peaks_V[:, None], bias_V, scale, made)

    if settings is None:
        pieces_N = _sample(targets, piece_counts_V, sample, generator)
        settings = max(_CODE_SETTINGS, key=lambda tried: _row_cosine(solve(pieces_N, tried), weights_VV, pieces_N))
    if settings.bias <= 0 or settings.ridge <= 0 or (settings.max_terms is not None and settings.max_terms < 1):
        raise UserError(f"{settings}: bias, ridge and max_terms must be above 0")
    return solve(np.flatnonzero(np.diff(targets.indptr)), settings)


def save_low_rank(
    folder: Path,
    factors: LowRankFactors,
    tokenizer: Tokenizer,
    *,
    max_length: int = 512,
    pooling: Literal["sum", "max"] = "sum",
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> None:
    """Save as stock ``Transformer(fill-mask)`` + ``SpladePooling``; ``SparseEncoder(folder)`` loads it without soju.

    ``export.json`` in the folder keeps the scale of the weights and how the factors were made.

    Args:
        folder: Made when it is missing.
        factors: From `factorise_codes`.
        tokenizer: Its piece ids are the rows of the factors.
        max_length: Pieces after which a text is cut, the start piece included.
        pooling: How the pieces of a text share a term. ``sum`` is what the exact encoder does; ``max`` counts a term
            once, however many pieces stand for it.
        dtype: Type of the stored weights. The model computes in float32 all the same.

    Raises:
        UserError: If the tokenizer does not fit the factors.
    """
    if (size := tokenizer.get_vocab_size()) != len(factors.pieces_VC):
        raise UserError(
            f"the tokenizer has {size:,} pieces, the factors {len(factors.pieces_VC):,}; use the model's own"
        )
    stock = stock_tokenizer(tokenizer, max_length=max_length, start_token=True)
    model = _bert(factors, max_length=max_length, pad_token_id=stock.pad_token_id)
    model.to(getattr(torch, dtype))
    model.config.dtype = torch.float32  # what the weights are loaded as
    with TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        _compute_in_float32(Path(temporary))
        stock.save_pretrained(temporary)
        transformer = Transformer(
            temporary, transformer_task="fill-mask", model_kwargs={"dtype": getattr(torch, dtype)}
        )
        pool = SpladePooling(pooling_strategy=pooling, embedding_dimension=size)
        encoder = SparseEncoder(modules=[transformer, pool], device="cpu")
        encoder.save(str(folder), create_model_card=False)
    _compute_in_float32(folder)
    write_json(folder / "export.json", {"scale": factors.scale, "pooling": pooling, **factors.settings})


def normalised_pieces(pieces_VC: Floats) -> tuple[Floats, float]:
    """Append the slack dimensions; returns ``(V, D)`` rows of mean 0 and variance 1, and the factor of the codes.

    With s the sum of the scaled code and r = D - |code|², the slack is ``-s / 2 ± sqrt((r - s² / 2) / 2)``.
    """
    hidden_size = pieces_VC.shape[1] + SLACK
    codes_VC = pieces_VC.astype(np.float64)
    needed_V = (codes_VC**2).sum(axis=1) + codes_VC.sum(axis=1) ** 2 / 2
    factor = float(np.sqrt(0.99 * hidden_size / max(needed_V.max(), 1e-12)))
    codes_VC *= factor
    sums_V = codes_VC.sum(axis=1)
    spread_V = np.sqrt((hidden_size - (codes_VC**2).sum(axis=1) - sums_V**2 / 2) / 2)
    rows_VD = np.column_stack([codes_VC, -sums_V / 2 + spread_V, -sums_V / 2 - spread_V])
    return rows_VD.astype(np.float32), factor


def _bert(factors: LowRankFactors, *, max_length: int, pad_token_id: int) -> BertForMaskedLM:
    rows_VD, factor = normalised_pieces(factors.pieces_VC)
    size, hidden_size = rows_VD.shape
    config = BertConfig(
        vocab_size=size,
        hidden_size=hidden_size,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=1,
        hidden_act="linear",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=max_length,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        pad_token_id=pad_token_id,
        tie_word_embeddings=False,
    )
    model = BertForMaskedLM(config).eval()
    embeddings, head = model.bert.embeddings, model.cls.predictions
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(torch.from_numpy(rows_VD))
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        head.transform.dense.weight.copy_(torch.eye(hidden_size))
        head.transform.dense.bias.zero_()
        head.decoder.weight.zero_()
        head.decoder.weight[:, :-SLACK] = torch.from_numpy(factors.terms_VC / np.float32(factor))
        head.decoder.bias.copy_(torch.from_numpy(-factors.bias_V))
        head.bias.copy_(head.decoder.bias)
    return model


def _compute_in_float32(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "dtype": "float32"})


def _targets(weights_VV: csr_array, hidden_size: int) -> tuple[csr_array, float]:
    if weights_VV.ndim != 2 or weights_VV.shape[0] != weights_VV.shape[1]:
        raise UserError(f"the weights are {weights_VV.shape}; a square matrix was expected")
    if hidden_size <= SLACK:
        raise UserError(f"hidden_size is {hidden_size}; it must be above {SLACK}")
    if not weights_VV.nnz or not (np.isfinite(weights_VV.data) & (weights_VV.data >= 0)).all():
        raise UserError("there is no weight, or one is negative or not finite; a ReLU cannot give it")
    targets = csr_array(weights_VV.astype(np.float32))
    targets.sum_duplicates()
    targets.eliminate_zeros()
    scale = float(targets.data.max()) / PEAK
    targets.data = np.expm1(targets.data / np.float32(scale))
    return targets, scale


def _heaviest(targets: csr_array, most: int) -> csr_array:
    order = np.lexsort((-targets.data, np.repeat(np.arange(targets.shape[0]), np.diff(targets.indptr))))
    place = np.empty(targets.nnz, np.int64)
    place[order] = np.arange(targets.nnz)
    kept = targets.copy()
    kept.data[place - np.repeat(targets.indptr[:-1], np.diff(targets.indptr)) >= most] = 0
    kept.eliminate_zeros()
    return kept


def _ridge(relative: csr_array, pieces_N: NDArray[np.int64], codes_VC: Floats, *, bias: float, ridge: float) -> Floats:
    pieces_VC = np.zeros_like(codes_VC)
    lengths_N = np.diff(relative.indptr)[pieces_N]
    for length in np.unique(lengths_N):
        same = pieces_N[lengths_N == length]
        chunk = max(1, 20_000_000 // (int(length) * codes_VC.shape[1]))
        for start in range(0, len(same), chunk):
            rows = same[start : start + chunk]
            entries_NK = relative.indptr[rows][:, None] + np.arange(length)
            codes_NKC = codes_VC[relative.indices[entries_NK]]
            gram_NKK = codes_NKC @ codes_NKC.transpose(0, 2, 1) + ridge * np.eye(length, dtype=np.float32)
            wanted_NK1 = (relative.data[entries_NK] + np.float32(bias))[:, :, None]
            solution_NK1 = np.linalg.solve(gram_NKK, wanted_NK1)
            pieces_VC[rows] = (codes_NKC * solution_NK1).sum(axis=1)
    return pieces_VC


def _sample(
    targets: csr_array, piece_counts_V: NDArray[Any] | None, sample: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    chances_V = (np.diff(targets.indptr) > 0).astype(np.float64)
    if piece_counts_V is not None:
        chances_V *= piece_counts_V
    if not chances_V.any():
        raise UserError("no piece with a weight was counted; pass the counts of another text, or none")
    size = min(sample, int(np.count_nonzero(chances_V)))
    return np.sort(generator.choice(len(chances_V), size, replace=False, p=chances_V / chances_V.sum()))


def _row_cosine(factors: LowRankFactors, weights_VV: csr_array, pieces_N: NDArray[np.int64]) -> float:
    exact_NV = weights_VV[pieces_N].toarray()
    found_NV = factors.weights(pieces_N)
    norms_N = np.linalg.norm(exact_NV, axis=1) * np.linalg.norm(found_NV, axis=1)
    return float(np.mean((exact_NV * found_NV).sum(axis=1) / np.maximum(norms_N, 1e-12)))


def own_term_weights(canonical_VV: csr_array, idf_V: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return, ``(V,)``, the weight of each piece for the term of its own name: ``canonical[p, p] · idf[p]``.

    What a piece counts for besides itself (``networks`` for network) has no place in one weight a piece and is lost;
    `soju.sparse.export.stock` keeps it.
    """
    if canonical_VV.shape != (len(idf_V), len(idf_V)):
        raise UserError(f"idf has {len(idf_V):,} values for a matrix of {canonical_VV.shape}; give one a term")
    return (canonical_VV.diagonal() * idf_V).astype(np.float32)


def save_stock_static(
    folder: Path, tokenizer: Tokenizer, weights_V: NDArray[np.floating[Any]], *, max_length: int = 512
) -> None:
    """Save a ``SparseEncoder`` that gives each piece of a text its weight, once however often it occurs.

    The folder loads with ``SparseEncoder(folder)``; soju is not needed.

    Args:
        folder: Made when it is missing.
        tokenizer: Its piece ids are the dimensions of the vectors.
        weights_V: Weight of each piece, ``(V,)``, finite, >= 0; usually idf. The unknown piece must weigh 0.
        max_length: Pieces after which a text is cut.

    Raises:
        UserError: If the weights do not fit the tokenizer or are unusable.
    """
    size = tokenizer.get_vocab_size()
    if weights_V.shape != (size,):
        raise UserError(f"the tokenizer has {size:,} pieces, the weights are {weights_V.shape}; give one a piece")
    if not (np.isfinite(weights_V) & (weights_V >= 0)).all():
        raise UserError("a weight is negative or not finite; smooth the idf first")
    stock = stock_tokenizer(tokenizer, max_length=max_length)
    if weights_V[stock.pad_token_id] != 0:
        raise UserError(f"the unknown piece {stock.pad_token!r} has a weight; set it to 0, it is the padding as well")
    module = SparseStaticEmbedding(stock, weight=torch.from_numpy(weights_V.astype(np.float32)), frozen=True)
    SparseEncoder(modules=[module], device="cpu").save(str(folder), create_model_card=False)


IDF_FILE = "idf.json"
"""``{piece: weight}``: what OpenSearch's sparse tokenizer models carry beside ``tokenizer.json``."""
_BATCH = 256


def piece_frequency(tokenizer: Any, texts: Iterable[str]) -> tuple[NDArray[np.int64], int]:
    """Count the texts that hold each piece, ``(V,)``, and all texts."""
    frequency_V = np.zeros(len(tokenizer), np.int64)
    total = 0
    remaining: Iterator[str] = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            frequency_V[np.unique(np.asarray(ids, np.int64))] += 1
        total += len(batch)
    return frequency_V, total


def save_inference_free(folder: Path, model: SparseEncoder, idf_V: NDArray[np.floating[Any]]) -> None:
    """Save a ``SparseEncoder`` whose queries are looked up: each piece of a text has its idf once, special tokens none.

    The folder loads with ``SparseEncoder(folder)``; ``encode_query`` takes the table, ``encode_document`` the model.
    soju is not needed.

    Args:
        folder: Made when it is missing.
        model: A stock model of ``Transformer`` and ``SpladePooling``.
        idf_V: Weight of each piece, ``(V,)``, finite, >= 0.

    Raises:
        UserError: If the model's vectors do not have one dimension a piece, or a weight is unusable.
    """
    tokenizer = model.tokenizer
    dimensions = model.get_embedding_dimension()
    if dimensions != len(tokenizer):
        raise UserError(
            f"the model's vectors have {dimensions:,} dimensions and its tokenizer {len(tokenizer):,} pieces, so a "
            "table of pieces does not fit them; trim the model first (soju trim)"
        )
    if idf_V.shape != (len(tokenizer),):
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} pieces, the idf is {idf_V.shape}; give one value a piece"
        )
    if not (np.isfinite(idf_V) & (idf_V >= 0)).all():
        raise UserError("an idf value is negative or not finite; smooth it first")
    weights_V = idf_V.astype(np.float32)
    weights_V[tokenizer.all_special_ids] = 0
    table = SparseStaticEmbedding(tokenizer, weight=torch.from_numpy(weights_V), frozen=True)
    table.max_seq_length = model.max_seq_length
    router = Router.for_query_document([table], list(model))
    both = SparseEncoder(modules=[router], similarity_fn_name=model.similarity_fn_name, device="cpu")
    both.save(str(folder), create_model_card=False)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    weighted = zip(pieces, weights_V.tolist(), strict=True)
    write_json(folder / IDF_FILE, {piece: round(weight, 6) for piece, weight in weighted if weight > 0})
    write_manifest(folder)


def make_inference_free(model: str, corpus: Sequence[str], target: Path, *, on_error: OnError = "stop") -> ReadLog:
    """Write a neural model with an idf table of a corpus in place of its query side.

    Args:
        model: See `soju.load`.
        corpus: Documents whose pieces are counted: those that will be searched, or others like them.
        target: Folder, must not exist.
        on_error: Whether broken rows stop or are left out.

    Returns:
        What was read and refused.

    Raises:
        UserError: If the target exists, there is no corpus, or the model needs no network for queries already.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; give another name or remove it first")
    if not corpus:
        raise UserError("--to inference-free needs --corpus: documents whose pieces are counted for the idf")
    encoder = load(model).encoder
    if not isinstance(encoder, NeuralEncoder) or isinstance(encoder, InferenceFreeEncoder):
        raise UserError(f"{model}: needs no network for queries already; index and search with it as it is")
    log = ReadLog()
    # 1. In how many documents does each piece stand?
    texts = (document.text for document in read_documents(corpus, on_error, log))
    frequency_V, documents = piece_frequency(encoder.model.tokenizer, texts)
    # 2. The rarer, the heavier: the same smoothed idf as everywhere here.
    save_inference_free(target, encoder.model.as_stock(), idf(frequency_V, documents))
    return log
