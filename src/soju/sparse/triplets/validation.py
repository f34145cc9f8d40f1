"""How good is a student on development triplets? Retrieval among their texts, and the loss.

Shape letters: Q = development queries, D = documents that are searched, V = terms in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.evaluation import BaseEvaluator

from soju.core.score import Score
from soju.core.setting import Setting
from soju.evaluation.retrieval import RetrievalSet, evaluate
from soju.sparse.neural_encoders import unit_rows
from soju.sparse.triplets.config import TripletsConfig
from soju.sparse.triplets.loss import TripletsLoss
from soju.sparse.triplets.rows import TripletRows, TripletsCollator

CHOSEN_BY = "mrr@10"
"""The best checkpoint has the highest MRR@10 of development queries over the texts of all development triplets."""
_METRICS = (CHOSEN_BY, "recall@1", "recall@10")


class TripletsValidation(BaseEvaluator):
    """Searches the texts of development triplets and takes the loss on them.

    Args:
        rows: Development triplets, none of whose queries was trained on.
        config: Settings of the run.
        pad_id: Of the student's tokenizer.
        distractors: Further texts to search.
    """

    def __init__(
        self, rows: TripletRows, config: TripletsConfig, *, pad_id: int, distractors: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.primary_metric = CHOSEN_BY
        self._rows = rows
        self._config = config
        self._collate = TripletsCollator(rows, None, pad_id=pad_id)
        self._queries = [rows.texts[number] for number in dict.fromkeys(rows.numbers_R3[:, 0].tolist())]
        texts = (rows.texts[number] for number in rows.numbers_R3[:, 1:].ravel().tolist())
        self._documents = list(dict.fromkeys((*texts, *distractors)))
        answers: dict[str, set[str]] = {}
        for row in rows.triplets:
            answers.setdefault(row.query, set()).add(row.positive)
        documents = dict(zip(self._documents, self._documents, strict=True))
        self._set = RetrievalSet.create("dev triplets", {text: text for text in self._queries}, documents, answers)
        self._setting = Setting("student", self._set.name, self._set.hash)
        self.loss: TripletsLoss | None = None
        """Of the trainer, for ``val/loss``; set when there is one."""

    @property
    def chosen_by(self) -> str:
        """Name of the score that checkpoints are judged and chosen by."""
        return CHOSEN_BY

    def judged(self, value: float) -> Score:
        """Return the score with its signature."""
        return self._setting.score(
            CHOSEN_BY, value, unit="fraction", higher_is_better=True, similarity=self._config.similarity
        )

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1, **_: Any
    ) -> dict[str, float]:
        """Return retrieval over the development texts, active terms and the loss."""
        queries_QV, documents_DV = (model.encode_sparse(texts) for texts in (self._queries, self._documents))
        stored_DV = unit_rows(documents_DV) if self._config.similarity == "cosine" else documents_DV
        scores_QD = (queries_QV @ stored_DV.T).toarray()
        best_Q10 = np.argsort(-scores_QD, axis=1, kind="stable")[:, :10]
        found = evaluate(
            self._set.run_of([row[scores_QD[query, row] > 0] for query, row in enumerate(best_Q10)]),
            self._set,
            subject="student",
            metrics=_METRICS,
            samples=100,
        )
        result = {score.name: score.value for score in found.scores}
        result["active_query"] = queries_QV.nnz / len(self._queries)
        result["active_document"] = documents_DV.nnz / len(self._documents)
        if self.loss is not None:
            result["loss"] = self._mean_loss(self.loss, model)
        return result

    @torch.no_grad()
    def _mean_loss(self, loss: TripletsLoss, model: Any) -> float:
        """Return the mean loss over batches of the training's size, at the stage of the step.

        Only the first rank validates, so nothing here may wait for the others: neither the wrapper that the trainer
        puts around the model, nor a mean over ranks.
        """
        size = self._config.training.batch_size
        training, wrapped = loss.training, loss.model
        loss.eval()
        loss.model = model
        values: list[float] = []
        try:
            for start in range(0, len(self._rows) - size + 1, size) or (0,):
                batch = self._collate([{"row": row} for row in range(start, min(start + size, len(self._rows)))])
                device = next(loss.parameters()).device
                features = {
                    name.removeprefix("text_"): value.to(device) for name, value in batch.items() if name != "label"
                }
                values.append(float(torch.stack(list(loss([features], batch["label"]).values())).sum()))
        finally:
            loss.model = wrapped
            loss.train(training)
        return float(np.mean(values))
