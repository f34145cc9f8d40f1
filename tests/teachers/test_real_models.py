"""Teachers with real weights: what a pico model cannot show."""

import json
from importlib.resources import files

import numpy as np

from fixtures.needs import REAL_MODELS, needs_model
from soju.teachers.dense import SentenceTransformerTeacher


@needs_model("multilingual-e5-small")
def test_a_real_multilingual_teacher_finds_the_passage_of_a_question_in_the_other_language():
    samples = (files("soju") / "samples" / "passages.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in samples][::6]
    folder = str(REAL_MODELS / "multilingual-e5-small")
    questions = SentenceTransformerTeacher(folder, prompt="query: ", device="cpu").embed(
        [row["query_ko"] for row in rows]
    )
    passages = SentenceTransformerTeacher(folder, prompt="passage: ", device="cpu").embed([row["en"] for row in rows])
    found = (questions @ passages.T).argmax(axis=1) == np.arange(len(rows))
    assert len(rows) == 20
    assert found.mean() >= 0.9
