"""The forms a student ships in beside its float32 weights, each judged by the gate like the student itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import M2M100ForConditionalGeneration

from soju.core.files import write_json, write_manifest
from soju.translation.config import ValidationConfig
from soju.translation.ctranslate import CTranslate2Model, convert
from soju.translation.validation import Translate
from soju.translation.vocabulary import Vocabulary

ARTEFACTS: Mapping[str, str] = {"ctranslate2-int8": "int8", "ctranslate2-float16": "float16"}
"""Name -> quantisation of CTranslate2: int8 weights and activations, or float16 weights."""


def export_artefacts(
    student: M2M100ForConditionalGeneration, vocabulary: Vocabulary, folder: Path, settings: ValidationConfig
) -> Iterator[tuple[str, Translate]]:
    """Write the student in each form and yield what translates with it; none where CTranslate2 is not installed.

    Args:
        student: Left as it is; converters get copies.
        vocabulary: Of the student.
        folder: Gets a folder for each form; what is in it is replaced.
        settings: How to decode.

    Yields:
        Name of the form, and what translates with it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if importlib.util.find_spec("ctranslate2") is None:
        return
    for name, quantization in ARTEFACTS.items():
        convert(student, vocabulary, folder / name, quantization=quantization)
        served = CTranslate2Model(folder / name, max_length=settings.max_length, batch_size=settings.batch_size)
        yield name, served.translate


def final_folder(best: Path, artefacts: Path, target: Path, passed: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Make ``final/``: the student's weights, every form that passed, the metadata, and a manifest last.

    Args:
        best: Folder of the student.
        artefacts: Folder of the forms.
        target: New folder, published by one rename.
        passed: Names of what passed the gate.
        metadata: For ``metadata.json``.
    """
    staged = target.with_name(f".{target.name}")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(best, staged)
    for name in ARTEFACTS:
        if name in passed:
            shutil.copytree(artefacts / name, staged / name)
    write_json(staged / "metadata.json", metadata)
    write_manifest(staged)
    os.replace(staged, target)
