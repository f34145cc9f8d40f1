"""Expand a model's vocabulary by a donor's Korean tokens. What ``soju expand`` and stage 0 do."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.logging import disable_progress_bar

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest
from soju.core.language import is_hangul
from soju.core.model_folder import find_model_folder
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DOCUMENTS, PAIRS, PairRow
from soju.embedding.expansion.byte_bpe import TOKENIZER_FILE, ByteBpe
from soju.embedding.expansion.certificate import CHECKED_TEXTS, Certificate, certify
from soju.embedding.expansion.difference import (
    VocabularyDifference,
    difference_rows,
    difference_statistics,
    find_candidates,
)
from soju.embedding.expansion.initialise import check_initialiser, new_rows
from soju.embedding.expansion.merges import (
    Expansion,
    Method,
    count_pre_tokens,
    expand_by_added_tokens,
    expand_by_corpus,
    expand_by_merges,
    expanded_spec,
    write_tokenizer,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase


DIFFERENCE_FILE, STATISTICS_FILE = "vocab_diff.json", "vocab_diff_stats.json"
HELD_OUT = 2000
"""Korean texts of the corpus at most that are only measured on."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Korean texts: some decide about merges, the others only measure."""

    texts: Sequence[str] = ()
    held_out: Sequence[str] = ()

    @classmethod
    def of(cls, texts: Sequence[str], *, place: str) -> Corpus:
        """Hold a tenth of the texts out, at most `HELD_OUT`; `UserError` if there is no Korean among them."""
        if not any(is_hangul(character) for text in texts for character in text):
            raise UserError(f"{place}: no Korean text; give Korean text, one document a line")
        if len(texts) == 1:
            return cls(texts)
        every = max(10, -(-len(texts) // HELD_OUT))
        return cls([text for place, text in enumerate(texts) if place % every], texts[::every])


def expand_model(
    base: str,
    donor: str,
    out: Path,
    *,
    corpus: Path | Sequence[str] | Corpus | None = None,
    pairs: Sequence[PairRow] = (),
    method: Method = "merges",
    initialiser: str = "mean",
    limit: int | None = None,
    max_intermediates: int | None = None,
    on_error: OnError = "stop",
    speed: bool = True,
    seed: int = 0,
) -> Path:
    """Give an embedding model the donor's Korean tokens, save it and prove that nothing else changed.

    Args:
        base: A sentence-transformers model with a byte-level BPE tokenizer: folder or hub id.
        donor: A tokenizer with a Korean vocabulary: folder, ``tokenizer.json`` or hub id. Its vectors are read where
            its folder holds a model and the initialiser needs them.
        out: Folder to write, must not exist. Without ``manifest.json`` when the certificate failed.
        corpus: Files of Korean texts, or the texts, which then decide the order of merges; else the donor's order of
            ids does.
        pairs: Sentence pairs, for the initialiser ``aligned``.
        method: ``merges``, or ``added-tokens`` for comparison, whose certificate is written but not judged.
        initialiser: Where new rows start, see `soju.embedding.expansion.initialise`.
        limit: New tokens at most, parts of candidates counted; >= 1.
        max_intermediates: Tokens at most that are only parts of candidates.
        on_error: ``stop`` at broken rows of the corpus, or ``skip`` and count them.
        speed: Measure load time and throughput of the tokenizers, some seconds for a large one.
        seed: Of initialisers that draw.

    Returns:
        `out`.

    Raises:
        UserError: If a tokenizer is of another kind, the base is no embedding model, `out` exists, a number is out of
            range, or the corpus cannot be read or holds no Korean.
        CertificateError: If a check failed; everything is written all the same, for inspection.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give another name or remove it first")
    if limit is not None and limit < 1:
        raise UserError(f"limit: got {limit}; give at least 1 new token, or no limit")
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    # 1. Analyse: read both tokenizers before any weight.
    old, giver = ByteBpe.load(base), ByteBpe.load(donor)
    starts = check_initialiser(initialiser, giver, with_corpus=bool(corpus), with_pairs=bool(pairs))
    texts = _read_corpus(corpus, on_error)
    # 2. Difference: what the donor has and the base lacks.
    difference = find_candidates(old, giver)
    # 3. Expand by merges behind all old ones.
    expansion = _expand(old, difference, texts, method, limit=limit, max_intermediates=max_intermediates)
    expanded = ByteBpe.from_spec(expanded_spec(old, expansion), name="expanded")
    # 4. Initialise the new rows from the old ones.
    folder = find_model_folder(base).path
    model = _load_model(folder, base)
    original = _load_model(folder, base)
    embedding_VD = model[0].auto_model.get_input_embeddings().weight.detach()[: old.size]
    if len(embedding_VD) < old.size:
        raise UserError(
            f"{base}: its tokenizer has {old.size:,} ids and its embedding {len(embedding_VD):,} rows; give a base "
            f"whose tokenizer and model belong together"
        )
    rows_ND = new_rows(
        embedding_VD, expansion, starts, base=old, expanded=expanded, donor=giver, corpus=texts.texts, pairs=pairs,
        seed=seed,
    )  # fmt: skip
    _resize(model, expansion, rows_ND)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        # 5. Save a stock sentence-transformers folder, with what was taken and what was not.
        _save(model, old, expansion, temporary, place=_transformer_place(folder, old))
        samples = _samples(texts)
        tokenizers = {"base": old, "donor": giver, "expanded": expanded}
        statistics = difference_statistics(tokenizers, difference, expansion, samples)
        write_json(temporary / DIFFERENCE_FILE, difference_rows(difference, giver, expansion))
        write_json(temporary / STATISTICS_FILE, {"base": base, "donor": donor, "method": method, **statistics})
        # 6. Certify what was saved, loaded again.
        certificate = _certify(old, expansion, temporary, original, samples, speed=speed)
        judged = method == "merges"
        if not (judged and certificate.failed):
            write_manifest(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if judged:
        certificate.raise_if_failed(out)
    return out


@dataclass(frozen=True, slots=True)
class ExpandedModel:
    """An embedding model with new tokens, and the proof that nothing else changed."""

    model: SentenceTransformer
    """With the expanded tokenizer; ids and rows of old tokens are as they were."""
    expansion: Expansion
    """The new tokens and merges."""
    statistics: dict[str, Any]
    """Sizes, tokens a text by language and tokenizer, and candidates that were left out."""
    certificate: dict[str, Any]
    """Every check with the number of texts, tokens or tensors it looked at."""


def expand_vocabulary(
    model: SentenceTransformer | str | Path,
    donor: PreTrainedTokenizerBase | str | Path,
    *,
    corpus: Sequence[str] = (),
    pairs: Sequence[PairRow] = (),
    method: Method = "merges",
    initialiser: str = "mean",
    limit: int | None = None,
    max_intermediates: int | None = None,
    seed: int = 0,
) -> ExpandedModel:
    """Give an embedding model the donor's Korean tokens; see `expand_model`, which writes a folder.

    Args:
        model: A sentence-transformers model with a byte-level BPE tokenizer, or its folder or hub id.
        donor: A byte-level BPE tokenizer with a Korean vocabulary, or its folder or hub id.
        corpus: Korean texts that decide the order of merges; a tenth of them only measures.
        pairs: Sentence pairs, for the initialiser ``aligned``.
        method: ``merges``, or ``added-tokens`` for comparison.
        initialiser: Where new rows start: ``mean``, ``aligned``, ``omp``, ...
        limit: New tokens at most, >= 1.
        max_intermediates: New tokens at most that are only parts of others.
        seed: Of initialisers that draw.

    Returns:
        The expanded model, a new one on the CPU.

    Raises:
        UserError: If a tokenizer is of another kind, a number is out of range, or the corpus holds no Korean.
        CertificateError: If a check failed.

    Example:
        >>> import soju
        >>> expanded = soju.embedding.expand_vocabulary(base, donor)  # folders, or loaded models
        >>> isinstance(expanded, soju.embedding.ExpandedModel), expanded.certificate["passed"]
        (True, True)
        >>> len(expanded.model.tokenizer.tokenize("오늘 회의"))
        2
    """
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory(prefix="soju-") as temporary:
        folder = Path(temporary)
        out = expand_model(
            _saved(model, folder / "base"),
            _saved(donor, folder / "donor"),
            folder / "out",
            corpus=Corpus.of(corpus, place="corpus") if corpus else None,
            pairs=pairs,
            method=method,
            initialiser=initialiser,
            limit=limit,
            max_intermediates=max_intermediates,
            speed=False,
            seed=seed,
        )
        return ExpandedModel(
            SentenceTransformer(str(out), device="cpu", local_files_only=True).eval(),
            Expansion.load(out),
            *(json.loads((out / name).read_text(encoding="utf-8")) for name in (STATISTICS_FILE, "certificate.json")),
        )


def _saved(given: SentenceTransformer | PreTrainedTokenizerBase | str | Path, folder: Path) -> str:
    """Return the name of a model or tokenizer; one in memory is saved to the folder."""
    if isinstance(given, str | Path):
        return str(given)
    given.save_pretrained(str(folder))
    return str(folder)


def read_pairs(sources: Sequence[str], on_error: OnError) -> list[PairRow]:
    """Read sentence pairs of files or hub sets, broken rows refused or counted (`DataError`)."""
    log = ReadLog()
    rows = list(read_rows(sources, PAIRS, log=log))
    log.raise_if_broken(on_error)
    return rows


def _read_corpus(corpus: Path | Sequence[str] | Corpus | None, on_error: OnError) -> Corpus:
    if corpus is None or isinstance(corpus, Corpus):
        return corpus or Corpus()
    sources = [str(corpus)] if isinstance(corpus, Path | str) else list(corpus)
    if not sources:
        return Corpus()
    log = ReadLog()
    texts = [document.text for document in track(read_rows(sources, DOCUMENTS, log=log), "corpus")]
    log.raise_if_broken(on_error)
    return Corpus.of(texts, place=", ".join(sources))


def _expand(
    base: ByteBpe,
    difference: VocabularyDifference,
    corpus: Corpus,
    method: Method,
    *,
    limit: int | None,
    max_intermediates: int | None,
) -> Expansion:
    if method == "added-tokens":
        return expand_by_added_tokens(base, difference.candidates, limit=limit)
    if not corpus.texts:
        return expand_by_merges(base, difference.candidates, limit=limit, max_intermediates=max_intermediates)
    counts = count_pre_tokens(base, track(corpus.texts, "count"))
    return expand_by_corpus(base, difference.candidates, counts, limit=limit, max_intermediates=max_intermediates)


def _load_model(folder: Path, name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    if not (folder / "modules.json").is_file():
        raise UserError(
            f"{name}: no sentence-transformers model (no modules.json), so its pooling is not known; save it with "
            f"sentence-transformers first"
        )
    try:
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False, local_files_only=True)
        model[0].auto_model.get_input_embeddings()
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        cause = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{name}: cannot be loaded ({cause}); give a sentence-transformers embedding model") from None
    return model.eval()


def _resize(model: Any, expansion: Expansion, rows_ND: Any) -> None:
    """Put the new rows behind the old ids. Rows that pad the base's matrix beyond its ids are overwritten."""
    import torch

    transformer = model[0].auto_model
    if len(transformer.get_input_embeddings().weight) < expansion.size:
        transformer.resize_token_embeddings(expansion.size, mean_resizing=False)
    weight_VD = transformer.get_input_embeddings().weight
    with torch.no_grad():
        weight_VD[expansion.first_id : expansion.size] = rows_ND.to(weight_VD.dtype)


def _transformer_place(folder: Path, base: ByteBpe) -> Path:
    """Return where the tokenizer is inside the model's folder: its root, or the folder of the transformer."""
    assert base.folder is not None
    try:
        return base.folder.resolve().relative_to(folder.resolve())
    except ValueError:
        return Path()


def _save(model: Any, base: ByteBpe, expansion: Expansion, folder: Path, *, place: Path) -> None:
    model.save_pretrained(str(folder), create_model_card=False)
    found = sorted(file.parent for file in folder.rglob(TOKENIZER_FILE))
    write_tokenizer(base, expansion, found[0] if len(found) == 1 else folder / place)
    expansion.save(folder / "expansion.json")


def _samples(corpus: Corpus) -> Mapping[str, Sequence[str]]:
    """Return our texts by language, and what was held out of the corpus as the Korean ones where there is one."""
    return {
        language: tuple(corpus.held_out) if language == "ko" and corpus.held_out else CHECKED_TEXTS[language]
        for language in ("ko", "en", "code")
    }


def _certify(
    base: ByteBpe,
    expansion: Expansion,
    folder: Path,
    original: Any,
    samples: Mapping[str, Sequence[str]],
    *,
    speed: bool,
) -> Certificate:
    saved = _load_model(folder, str(folder))
    place = next(file.parent for file in sorted(folder.rglob(TOKENIZER_FILE)))
    certificate = certify(base, expansion, place, texts={"ko": samples["ko"]}, models=(original, saved), speed=speed)
    certificate.save(folder)
    return certificate
