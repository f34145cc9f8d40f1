"""Trim a masked language model to the vocabulary a corpus needs, before training. What ``soju trim`` does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soju.core.errors import UserError
from soju.core.files import write_json, write_manifest
from soju.core.language import language_of
from soju.core.model_folder import find_model_folder
from soju.core.progress import track
from soju.data.log import OnError, ReadLog
from soju.data.readers import read_rows
from soju.data.rows import DOCUMENTS, Document, PairRow, PassageRow, Row, TermRow, TripletRow
from soju.data.sources import FileSource, kind_of, resolve
from soju.sparse.trimmed_model import check_trimmed, choose_ids, count_ids, special_ids, tokenizer_spec, trim_vocabulary

MAX_SIZE = 65_535
"""Ids then fit 16 bits, and engines that take ids modulo 65,536 fold none."""
CHECKED_TEXTS = 32
TOLERANCE = 1e-3
"""Largest difference of a logit; the same weights in products of other sizes round differently."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)


@dataclass(frozen=True, slots=True)
class TrimReport:
    """What trimming saved and what it cost."""

    rows: int
    """Rows of the corpus."""
    ids_before: int
    ids_after: int
    head_megabytes_before: float
    """Output weights and, where tied, input embeddings, in 10^6 bytes."""
    head_megabytes_after: float
    corpus_tokens: int
    covered_share: float
    """Share of the corpus' tokens whose id was kept; the others are now spelt in smaller pieces. In [0, 1]."""
    ids_left_out: int
    """Ids the corpus needs that did not fit."""
    checked_texts: int
    """Texts whose pieces and logits were compared before and after."""


def trim(
    name: str,
    out: Path,
    corpus: Sequence[str],
    *,
    max_size: int = MAX_SIZE,
    on_error: OnError = "stop",
    revision: str | None = None,
) -> tuple[TrimReport, ReadLog]:
    """Trim a model's vocabulary and save it where ``AutoModelForMaskedLM`` and ``AutoTokenizer`` load it.

    Args:
        name: A masked language model: folder, ``package:NAME`` or hub id.
        out: Folder to write, must not exist.
        corpus: Files of rows of any kind, text that training and evaluation will meet; ``samples:NAME`` as well.
        max_size: Ids to keep at most.
        on_error: ``stop`` at broken rows, or ``skip`` and count them.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The report, which is also saved as ``trim.json``, and what was read and refused.

    Raises:
        UserError: If the model is not a masked language model with safetensors, `out` exists, the corpus cannot be read
            or holds no text, or `max_size` is too small.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give another name or remove it first")
    # 1. Count what the corpus needs, before any weight is read.
    folder = find_model_folder(name, revision=revision).path
    tokenizer = _load_tokenizer(folder, name)
    spec = tokenizer_spec(tokenizer)
    log = ReadLog()
    sample: list[str] = []
    counts_V = count_ids(spec, _sampled(track(corpus_texts(corpus, log), "corpus"), sample))
    log.raise_if_broken(on_error)
    if not counts_V.any():
        raise UserError(f"{', '.join(corpus)}: no text for this tokenizer; give the files training will read")
    # 2. Choose: what cannot be spared, what unseen text falls back to, then by frequency.
    model = _load_masked_lm(folder, name)
    kept = choose_ids(spec, counts_V, max_size=max_size, required=special_ids(model, tokenizer))
    # 3. Trim, and prove on texts of the corpus that nothing else changed.
    trimmed = trim_vocabulary(model, tokenizer, kept)
    checked = check_trimmed(model, tokenizer, trimmed, sample, tolerance=TOLERANCE)
    report = _report(model, trimmed.model, counts_V, kept, rows=log.kept, checked=checked)
    # 4. Save the folder whole or not at all.
    _save(out, trimmed.model, trimmed.tokenizer, report)
    return report, log


def corpus_texts(corpus: Sequence[str], log: ReadLog) -> Iterator[str]:
    """Yield the texts of files of any kind; the first row tells which kind a file holds."""
    for source in resolve(corpus, DOCUMENTS, root=None, log=log):
        if not isinstance(source, FileSource):
            remedy = "save its rows as .jsonl and name the file"
            log.refuse_file(source.name, 0, "a hub data set cannot be a corpus to trim by", remedy, "hub")
            continue
        kind = kind_of(source, log)
        if kind is not None:
            for row in read_rows([source.name], kind, log=log):
                yield from _texts_of(row)


def _sampled(texts: Iterable[str], sample: list[str]) -> Iterator[str]:
    """Pass texts on and put the first `CHECKED_TEXTS` into `sample`."""
    for text in texts:
        if len(sample) < CHECKED_TEXTS:
            sample.append(text)
        yield text


def _texts_of(row: Row) -> Iterator[str]:
    match row:
        case TermRow():
            yield row.ko
            for term in row.terms:
                yield term.text
                if language_of(term.text) != "ko" and term.text != term.text.lower():
                    yield term.text.lower()
        case PairRow():
            yield from (row.ko, row.en)
        case PassageRow():
            yield from (row.ko, row.en, row.query_ko, row.query_en)
        case TripletRow():
            yield from (row.query, row.positive, row.negative)
        case Document():
            yield row.text


def _load_tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in TOKENIZER_FILES):  # transformers would make an empty one
        raise UserError(f"{name}: no tokenizer in {folder}; give a complete model folder, with tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: no usable tokenizer ({_first_words(error)}); give a complete model folder") from None


def _load_masked_lm(folder: Path, name: str) -> Any:
    from transformers import AutoModelForMaskedLM

    remedy = "give a model with a masked-LM head, such as xlm-roberta-large"
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: not a masked language model ({_first_words(error)}); {remedy}") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{name}: not a masked language model, it has no {missing[0]}; {remedy}")
    return model.eval()


def _first_words(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _report(
    before: Any, after: Any, counts_V: NDArray[np.int64], kept: NDArray[np.int64], *, rows: int, checked: int
) -> TrimReport:
    total, covered = int(counts_V.sum()), int(counts_V[kept].sum())
    return TrimReport(
        rows=rows,
        ids_before=before.config.vocab_size,
        ids_after=len(kept),
        head_megabytes_before=_head_megabytes(before),
        head_megabytes_after=_head_megabytes(after),
        corpus_tokens=total,
        covered_share=covered / total,
        ids_left_out=int((counts_V > 0).sum() - (counts_V[kept] > 0).sum()),
        checked_texts=checked,
    )


def _head_megabytes(model: Any) -> float:
    weight = model.get_output_embeddings().weight
    return float(weight.numel() * weight.element_size() / 1e6)


def _save(out: Path, model: Any, tokenizer: Any, report: TrimReport) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "trim.json", asdict(report))
        write_manifest(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
