"""Compare embedding models side by side. What ``soju compare`` and ``soju evaluate`` do under ``recipe: embedding``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from soju.core.config import Settings, validate
from soju.core.errors import UserError
from soju.embedding.embedder import load_model
from soju.embedding.evaluation_config import EvaluationSettings
from soju.embedding.measuring import Measured, Subject, measure_models
from soju.evaluation.mteb_tasks import quiet

KEPT = ("best", "final")
"""Folders of a run that hold its model, the better first."""


class _Evaluated(Settings):
    evaluation: EvaluationSettings


def evaluation_of(values: Mapping[str, Any], *, place: str) -> EvaluationSettings:
    """Check the evaluation of a configuration of recipe ``embedding``; what it says of training is passed over.

    Args:
        values: The configuration as read.
        place: What errors call it.

    Returns:
        The settings, ``data.root`` filled in where they name no root.

    Raises:
        ConfigError: If a setting is wrong.
        UserError: If nothing is to be measured.
    """
    found = validate({"evaluation": values.get("evaluation") or {}}, _Evaluated, place=place).evaluation
    if not (found.sts or found.bitext or found.choices or found.retrieval):
        raise UserError(f"{place}: evaluation: names no set; give evaluation.sts, bitext, choices or retrieval")
    data = values.get("data")
    root = data.get("root") if isinstance(data, Mapping) else None
    if found.root is None and isinstance(root, str):
        found = found.model_copy(update={"root": Path(root)})
    return found


def subjects_of(models: Sequence[str]) -> list[Subject]:
    """Name models as briefly as tells them apart.

    A run folder stands for its best model. Names are the last parts of the paths, as many as differ: ``stage1`` of one
    run, ``run-a/stage1`` beside ``run-b/stage1``.

    Args:
        models: Folders, run folders, ``package:NAME`` or hub ids.

    Returns:
        One subject for each.

    Raises:
        UserError: If one is given twice.
    """
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise UserError(f"{twice}: given twice; give each model once")
    parts = [Path(model).parts or (model,) for model in models]  # "." has no parts
    most = max((len(part) for part in parts), default=1)
    for depth in range(1, most + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return [Subject(name, _model_of(model)) for name, model in zip(names, models, strict=True)]


def compare_models(models: Sequence[str], values: Mapping[str, Any], *, place: str) -> Measured:
    """Measure models on the test sets of a configuration; the first is what the others are compared with.

    Args:
        models: See `subjects_of`.
        values: The configuration as read.
        place: What errors call it.

    Returns:
        What `measure_models` gives.
    """
    disable_progress_bar()  # of the libraries: they would draw one for every file of weights
    return measure_models(subjects_of(models), evaluation_of(values, place=place))


def is_embedding_model(model: str) -> bool:
    """Tell whether a folder, or the best model of a run folder, pools token states into one dense vector."""
    file = Path(_model_of(model)) / "modules.json"
    if not file.is_file():
        return False
    modules = json.loads(file.read_text(encoding="utf-8"))
    return any(module["type"].rpartition(".")[2] == "Pooling" for module in modules)


def mteb_model(model: str) -> tuple[Any, str]:
    """Return an embedding model in mteb's own wrapper for sentence-transformers, and its name in tables.

    Args:
        model: See `subjects_of`.

    Returns:
        What ``mteb.evaluate`` takes, and the name.

    Raises:
        UserError: If it cannot be loaded.
    """
    from mteb.models import SentenceTransformerEncoderWrapper

    (subject,) = subjects_of([model])
    loaded = load_model(str(subject.folder_or_model))
    with quiet():
        return SentenceTransformerEncoderWrapper(loaded), subject.name


def _model_of(model: str) -> str:
    folder = Path(model)
    if folder.is_dir() and not (folder / "modules.json").is_file():
        for name in KEPT:
            if (folder / name / "modules.json").is_file():
                return str(folder / name)
    return model
