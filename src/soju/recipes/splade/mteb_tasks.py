"""Measure a model with mteb, on its retrieval tasks or on folders in the layout of BEIR. What ``soju mteb`` does."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soju.core.errors import MissingExtraError, UserError
from soju.core.records import Document
from soju.core.score import Score
from soju.data.beir import read_beir
from soju.data.log import ReadLog
from soju.evaluation.retrieval import RetrievalSet
from soju.evaluation.setting import Setting
from soju.recipes.splade.config import SearchSettings
from soju.recipes.splade.encoders import TermEncoder
from soju.recipes.splade.indexing import index_settings, model_folder, open_model, search_settings_of
from soju.search.index import SparseIndex

METRICS = {
    "ndcg@10": "ndcg_at_10",
    "mrr@10": "mrr_at_10",
    "recall@10": "recall_at_10",
    "recall@100": "recall_at_100",
    "recall@1000": "recall_at_1000",
}
"""Our names of what mteb measures."""


class MtebSearcher:
    """A model behind mteb's ``SearchProtocol``: it builds the index that ``soju index`` would, and searches it exactly.

    mteb's wrapper for ``SparseEncoder`` multiplies vectors alone; a static model needs the weighting of its index.

    Args:
        encoder: The model.
        name: What mteb calls it.
        fingerprint: What names its weights.
        search: How documents are weighted; for static encoders.
    """

    def __init__(self, encoder: TermEncoder, *, name: str, fingerprint: str, search: SearchSettings) -> None:
        self._encoder = encoder
        self._name = name
        self._fingerprint = fingerprint
        self._search_settings = search
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._index: SparseIndex | None = None

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes about the model."""
        from mteb.models.model_meta import ModelMeta

        about = {"name": f"soju/{self._name}", "revision": self._fingerprint[:16], "model_type": ["sparse"]}
        return ModelMeta.create_empty(overwrites=about)

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """Index the rows of a corpus: ``id``, ``text`` and perhaps ``title``, which is put before the text."""
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="soju-mteb-")
        self._index = SparseIndex.build(
            Path(self._folder.name) / "index",
            (Document(str(row["id"]), _text_of(row)) for row in corpus),
            self._encoder.encode_documents,
            self._encoder.terms,
            index_settings(self._encoder, self._search_settings, engine="exact"),
            prior_share_V=self._encoder.document_share_V,
        )

    def search(
        self, queries: Iterable[Mapping[str, Any]], *, top_k: int, top_ranked: object = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Search what was indexed.

        Args:
            queries: Rows with ``id`` and ``text``.
            top_k: Documents a query.
            top_ranked: Candidates of reranking tasks, which are not for searchers.

        Returns:
            Query id -> document id -> score.

        Raises:
            UserError: If candidates are given.
        """
        assert self._index is not None, "mteb indexes before it searches"
        if top_ranked is not None:
            raise UserError("a reranking task gives its own candidates; choose a retrieval task")
        rows = [(str(row["id"]), str(row["text"])) for row in queries]
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            vectors = self._encoder.encode_queries([text for _, text in part])
            hits = self._index.search(vectors, top_k, engine="exact", explain_hits=False)
            found |= {
                name: {hit.document_id: hit.score for hit in of} for (name, _), of in zip(part, hits, strict=True)
            }
        return found

    def close(self) -> None:
        """Remove the index."""
        self._index = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def run_tasks(
    model: str, tasks: Sequence[str], *, languages: Sequence[str] = ("kor", "eng"), split: str = "test"
) -> list[Score]:
    """Measure a model on tasks.

    Args:
        model: See `soju.recipes.splade.indexing.open_model`.
        tasks: Names of mteb's retrieval tasks, fetched from the hub, or folders in the layout of BEIR.
        languages: Which languages of a multilingual task to run, by ISO 639-3.
        split: Which judgements of a folder to ask for.

    Returns:
        `METRICS` of every task, split and language, as mteb computes them: equal scores rank by document id.

    Raises:
        MissingExtraError: If mteb is not installed.
        UserError: If a task is unknown, no retrieval of texts, or cannot be fetched.
    """
    if importlib.util.find_spec("mteb") is None:
        raise MissingExtraError("soju mteb", "mteb")
    import mteb

    encoder, fingerprint = open_model(model)
    folder = model_folder(model)
    name = folder.resolve().parent.name if folder.name in ("best", "final") else folder.name
    searcher = MtebSearcher(encoder, name=name, fingerprint=fingerprint, search=search_settings_of(folder))
    scores: list[Score] = []
    with _quiet():
        # Every name first: a wrong one is told before hours are spent on the others.
        for task in [
            folder_task(Path(task), split) if Path(task).is_dir() else _named_task(task, languages) for task in tasks
        ]:
            _load(task)
            try:
                results = mteb.evaluate(searcher, task, cache=None, co2_tracker=False, show_progress_bar=False)
            finally:
                searcher.close()
            scores += _scores(results.task_results[0], name, task.metadata.dataset["revision"])
    return scores


def folder_task(folder: Path, split: str) -> Any:
    """Return a folder in the layout of BEIR as a task of mteb; broken rows are a `DataError` with their lines."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    log = ReadLog()
    found = read_beir(str(folder), log=log, split=split)
    log.raise_if_broken()
    checked = RetrievalSet.create(f"{folder.resolve().name}/{split}", found.queries, found.documents, found.judgements)
    metadata_ = TaskMetadata(
        name=folder.resolve().name,
        description=f"the {split} split of {folder.resolve().name}",
        dataset={"path": str(folder), "revision": checked.hash},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=[split],
        eval_langs=["kor-Hang", "eng-Latn"],
        main_score="ndcg_at_10",
    )

    class FolderTask(AbsTaskRetrieval):
        """A folder, read."""

        metadata = metadata_

        def load_data(self, *_: Any, **__: Any) -> None:
            """Hand over what was read."""
            rows = ({"id": list(texts), "text": list(texts.values())} for texts in (found.documents, found.queries))
            corpus, queries = (Dataset.from_dict(columns) for columns in rows)
            judgements = {key: {name: int(gain) for name, gain in of.items()} for key, of in found.judgements.items()}
            one = {"corpus": corpus, "queries": queries, "relevant_docs": judgements, "top_ranked": None}
            self.dataset = {"default": {split: one}}
            self.data_loaded = True

    return FolderTask()


def _named_task(name: str, languages: Sequence[str]) -> Any:
    import mteb

    try:
        task = mteb.get_task(name, languages=list(languages))
    except (KeyError, ValueError) as error:
        why = str(error.args[0] if error.args else error).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: neither a folder nor a task of mteb ({why}); see mteb.get_tasks()") from None
    if task.metadata.type != "Retrieval" or task.metadata.modalities != ["text"]:
        raise UserError(f"{name}: a task of the kind {task.metadata.type}; choose one that retrieves texts")
    return task


def _load(task: Any) -> None:
    try:
        task.load_data()
    except UserError:
        raise
    except Exception as error:  # the hub client raises errors of a dozen unrelated families
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        place = task.metadata.dataset["path"]
        raise UserError(
            f"{task.metadata.name}: {place} cannot be fetched from the hub ({cause}); check the network, or give a "
            "folder with corpus.jsonl, queries.jsonl and qrels/test.tsv"
        ) from None


def _scores(result: Any, subject: str, revision: str) -> list[Score]:
    evaluator = f"mteb-{version('mteb')}"
    scores: list[Score] = []
    for split, subsets in result.scores.items():
        for values in subsets:
            subset = "" if values["hf_subset"] == "default" else f"-{values['hf_subset']}"
            setting = Setting(subject, f"{result.task_name}{subset}/{split}", revision)
            scores += [
                setting.score(ours, values[theirs], unit="fraction", higher_is_better=True, evaluator=evaluator)
                for ours, theirs in METRICS.items()
            ]
    return scores


def _text_of(row: Mapping[str, Any]) -> str:
    """Return title and text as mteb's own encoders read them."""
    return f"{row.get('title') or ''} {row['text']}".strip()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mteb's notes about itself from the user."""
    logger = logging.getLogger("mteb")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
