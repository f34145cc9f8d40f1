"""What mode ``terms`` teaches: rows of term mappings, judged by development words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from scipy.sparse import csr_array
from sentence_transformers.base.evaluation import BaseEvaluator

from soju.core.errors import UserError
from soju.core.files import append_json_line
from soju.core.score import Score, Setting
from soju.data.rows import TermRow
from soju.sparse.data import TrainingData
from soju.sparse.initial import Vocabulary, teacher_embeddings
from soju.sparse.neural import Lesson
from soju.sparse.neural_encoders import spelled_pieces
from soju.sparse.static.encoder import readable_terms
from soju.sparse.term_activation import FUNCTION_WORDS, PROBES, evaluate_terms, expected_terms, probe_report
from soju.sparse.terms.config import TermsConfig
from soju.sparse.terms.losses import TermsLoss
from soju.sparse.terms.rows import TermsCollator, TrainingRows, training_rows
from soju.teachers.cache import Embeddings
from soju.training.sampling import LengthBuckets


class TermsLesson(Lesson[TermsConfig]):
    """Head words and the terms they should activate; see `Lesson`."""

    losses = TermsLoss
    rows: TrainingRows
    vectors: Embeddings | None = None
    """What the teacher says of ``rows.teacher_texts``."""

    def __init__(self, config: TermsConfig, data: TrainingData, vocabulary: Vocabulary, folder: Path) -> None:
        super().__init__(config, data, vocabulary, folder)
        banned = [probe.source for probe in PROBES]
        self.rows = training_rows(data.terms, data.pairs, vocabulary, config, banned=banned)
        self.validation = Validation(data.dev_terms, vocabulary, folder / "probes.jsonl")

    def batches(self) -> int:
        """Return the batches of an epoch on one rank."""
        return -(-len(self.rows) // (self.config.training.batches[0] * PartialState().num_processes))

    def ask_teacher(self) -> None:
        """Embed what the teacher reads."""
        if self.dense_teacher is not None:
            self.vectors = teacher_embeddings(self.dense_teacher, self.rows.teacher_texts)

    def collator(self) -> TermsCollator:
        """Return what makes a batch."""
        return TermsCollator(self.rows, self.vectors, pad_id=self.pad_id)

    def sampler(self, data_order: int) -> LengthBuckets:
        """Return batches of similar lengths."""
        return LengthBuckets(self.rows.lengths, seed=self.config.seed + data_order)


CHOSEN_BY = "ko + 2 en"
"""The best checkpoint has the highest preservation.ko@50 + 2 × activation.en@50 on the development words."""


class Validation(BaseEvaluator):
    """Scores a student on development words and writes down what the probes activate.

    Args:
        rows: Development words, none of them trained on.
        vocabulary: The student's.
        probes: ``probes.jsonl`` of the run.

    Raises:
        UserError: If no development word has a term of one of the languages, so that nothing could be chosen by it.
    """

    def __init__(self, rows: Sequence[TermRow], vocabulary: Vocabulary, probes: Path) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._words = [row.ko for row in rows]
        self._english, self._korean = expected_terms(rows, vocabulary.terms)
        for language, expected in (("English", self._english), ("Korean", self._korean)):
            if not any(expected):
                raise UserError(
                    f"data.dev_terms: none of the {len(rows):,} development words has a term in {language} that "
                    "the vocabulary can spell; set a larger share"
                )
        self._vocabulary = vocabulary
        self._probes = probes
        self._setting = Setting.of_texts(
            [f"{row.ko}\t{[term.text for term in row.terms]}" for row in rows], subject="student", test_set="dev terms"
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return the metrics of the development words."""
        vectors = model.encode_sparse(self._words)
        terms = readable_terms(spelled_pieces(model.tokenizer, vectors.shape[1]))
        scores = evaluate_terms(
            vectors,
            english=self._english,
            korean=self._korean,
            vocabulary=terms,
            function_words=FUNCTION_WORDS,
            setting=self._setting,
        )
        found = {score.name: score.value for score in scores}
        found[CHOSEN_BY] = found["preservation.ko@50"] + 2 * found["activation.en@50"]
        self._watch_probes(model.encode_sparse([probe.source for probe in PROBES]), terms, epoch=epoch, step=steps)
        return {**found, "active_terms": vectors.nnz / len(self._words)}

    @property
    def chosen_by(self) -> str:
        """Name of the score that checkpoints are judged and chosen by."""
        return CHOSEN_BY

    def judged(self, value: float) -> Score:
        """Return the score that checkpoints are judged and chosen by."""
        return self._setting.score(CHOSEN_BY, value, unit="", higher_is_better=True, texts=len(self._words))

    def _watch_probes(self, vectors: csr_array, terms: Sequence[str], *, epoch: float, step: int) -> None:
        report = probe_report(vectors, self._vocabulary.terms, terms, function_words=FUNCTION_WORDS)
        if PartialState().is_main_process:
            append_json_line(self._probes, {"epoch": epoch, "step": step, **report})
