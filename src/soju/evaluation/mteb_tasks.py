"""Measure a model with mteb, on its tasks or on folders in the layout of BEIR. What ``soju mteb`` does."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soju.core.errors import MissingExtraError, UserError
from soju.core.results import Score, Setting
from soju.data.log import ReadLog
from soju.data.readers import read_beir
from soju.evaluation.retrieval import RetrievalSet

METRICS = {
    "ndcg@10": "ndcg_at_10",
    "mrr@10": "mrr_at_10",
    "recall@10": "recall_at_10",
    "recall@100": "recall_at_100",
    "recall@1000": "recall_at_1000",
}
"""Our names of what mteb measures."""


def run_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    name: str,
    languages: Sequence[str] = ("kor", "eng"),
    split: str = "test",
    retrieval_only: bool = False,
) -> list[Score]:
    """Measure a model on tasks.

    Args:
        model: What mteb takes for one: a searcher or an encoder.
        tasks: Names of mteb's tasks, fetched from the hub, or folders in the layout of BEIR.
        name: What tables call it.
        languages: Which languages of a multilingual task to run, by ISO 639-3.
        split: Which judgements of a folder to ask for.
        retrieval_only: Refuse tasks of other kinds: a searcher gives no vectors.

    Returns:
        `METRICS` of every retrieval task, split and language, the main score of others, as mteb computes them: equal
        scores rank by document id.

    Raises:
        UserError: If a task is unknown, of a kind the model cannot do, or cannot be fetched.
    """
    import mteb

    scores: list[Score] = []
    with quiet():
        # Every name first: a wrong one is told before hours are spent on the others.
        for task in [
            folder_task(Path(task), split) if Path(task).is_dir() else _named_task(task, languages, retrieval_only)
            for task in tasks
        ]:
            _load(task)
            try:
                results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
            finally:
                getattr(model, "close", lambda: None)()
            scores += _scores(results.task_results[0], name, task)
    return scores


def refuse_without_mteb() -> None:
    """Refuse to go on where mteb is not installed (`MissingExtraError`)."""
    if importlib.util.find_spec("mteb") is None:
        raise MissingExtraError("soju mteb", "mteb")


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


def _named_task(name: str, languages: Sequence[str], retrieval_only: bool) -> Any:
    import mteb

    try:
        task = mteb.get_task(name, languages=list(languages))
    except (KeyError, ValueError) as error:
        why = str(error.args[0] if error.args else error).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: neither a folder nor a task of mteb ({why}); see mteb.get_tasks()") from None
    if task.metadata.modalities != ["text"]:
        raise UserError(f"{name}: a task about {', '.join(task.metadata.modalities)}; choose one about texts")
    if retrieval_only and task.metadata.type != "Retrieval":
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


def _scores(result: Any, subject: str, task: Any) -> list[Score]:
    evaluator = f"mteb-{version('mteb')}"
    main = task.metadata.main_score
    metrics = METRICS if task.metadata.type == "Retrieval" else {main: main}
    scores: list[Score] = []
    for split, subsets in result.scores.items():
        for values in subsets:
            subset = "" if values["hf_subset"] == "default" else f"-{values['hf_subset']}"
            setting = Setting(subject, f"{result.task_name}{subset}/{split}", task.metadata.dataset["revision"])
            scores += [
                setting.score(ours, values[theirs], unit="fraction", higher_is_better=True, evaluator=evaluator)
                for ours, theirs in metrics.items()
            ]
    return scores


@contextmanager
def quiet() -> Iterator[None]:
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
