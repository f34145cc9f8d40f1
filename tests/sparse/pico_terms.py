"""Runs of mode ``terms`` that take a second: hidden 32, one layer, twelve sentence pairs; also a program to kill.

With ``tests`` on PYTHONPATH, ``python pico_terms.py START`` runs, in a fork that costs no imports, for each line it
reads: ``recipe FOLDER`` the whole recipe, ``student FOLDER`` only the training, from START; what was begun is resumed.
"""

import os
import sys
import traceback
from pathlib import Path

import torch

from soju.core.config import apply_overrides
from soju.core.run import open_run_folder
from soju.data.log import ReadLog
from soju.data.rows import Term, TermRow
from soju.report import plots
from soju.sparse.data import RunData, TrainingData
from soju.sparse.initial import plain_vocabulary
from soju.sparse.neural import make_trainer, train
from soju.sparse.recipe import RECIPE
from soju.sparse.splade import SpladeEncoder
from soju.sparse.terms.training import TermsLesson
from soju.training.rollback import Attempt
from sparse.pico_masked_lms import build
from sparse.small_bilingual import PAIRS, TERMS

DEV = [
    TermRow("의사", (Term("doctor", 1.0),)),
    TermRow("바다", (Term("sea", 1.0),)),
    TermRow("학생", (Term("student", 1.0), Term("사람", 0.4))),
]
SCRATCH = {
    "recipe": "splade",
    "mode": "terms",
    "name": "pico",
    "data": {
        "pairs": ["unused.tsv"],
        "terms": ["unused.jsonl"],
        "dev_terms": 0.1,
        "pairs_as_rows": True,
        "both_directions": True,
    },
    "student": {
        "init": "lexical",
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "intermediate_size": 32,
        "max_length": 16,
        "static": {"tokenizer": {"min_count": 1, "sub_words": 100}},
    },
    "losses": {"distillation": 0},
    "training": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "mixed_precision": "off",
        "eval_steps": 3,
        "logging_steps": 2,
        "max_drop": 0.9,
    },
    "evaluation": {"bootstrap_samples": 100, "latency_queries": 2},
}

WORDS = [
    ("검색", "search"),
    ("엔진", "engine"),
    ("문서", "documents"),
    ("신경망", "machine learning", "models"),
    ("한국어", "learn"),
    ("영어", "data", "한국어"),
    ("지구", "northern coast"),
    ("태양", "several", "지구"),
    ("주위", "along"),
    ("저녁", "kitchen"),
    ("오늘", "garlic"),
    ("김치찌개", "pepper", "저녁"),
    ("빠르게", "quickly"),
]
PROBE = "신경망"
"""One of `WORDS` that is a probe, so that it is never trained on."""
ROWS = [
    TermRow(ko, tuple(Term(term, 1.0 - 0.2 * place) for place, term in enumerate(terms)))
    for ko, *terms in WORDS
    if ko != PROBE
]
DEV_ROWS = [
    TermRow("검색 엔진", (Term("search engine", 1.0),)),
    TermRow("데이터", (Term("data", 1.0), Term("문서", 0.5))),
]


def config_of(values, *overrides):
    return RECIPE.configure(apply_overrides(values, overrides), place="pico")


def scratch_config(*overrides):
    return config_of(SCRATCH, *overrides)


def scratch_data():
    return RunData(TrainingData(PAIRS, TERMS, [], DEV, {"unused": len(TERMS)}, ReadLog(), {}), [])


def run_pico(folder, *overrides, resume=None):
    """Run the whole recipe on objects into a new folder, or go on with the run in it."""
    config = scratch_config(*overrides)
    begun = (folder / "config.yaml").is_file()
    run_dir = open_run_folder(folder, config, "as given", resumes=begun)
    return RECIPE.train(config, run_dir, data=scratch_data(), resume=resume or begun, workers=1)


def save_start(folder):
    """Save a masked language model of two layers; its tokenizer is another one every time it is trained."""
    model, tokenizer = build("unigram")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Pretrained:
    """A lesson of mode ``terms`` for a masked language model with its own vocabulary."""

    def __init__(self, folder, *overrides, start, terms=ROWS):
        self.folder = folder
        self.start = start
        student = {"init": "pretrained", "model": str(start), "max_length": 16}
        data = {"terms": ["unused.jsonl"]}
        self.config = config_of({**SCRATCH, "student": student, "data": data}, *overrides)
        self.vocabulary = plain_vocabulary(self.student().tokenizer)
        training = TrainingData([], terms, [], DEV_ROWS, {}, ReadLog(), {})
        self.lesson = TermsLesson(self.config, training, self.vocabulary, folder)
        self.rows = self.lesson.rows

    def student(self):
        return SpladeEncoder(self.start, max_seq_length=16, device="cpu")

    def train(self, *, resume=None):
        return train(self.lesson, self.student, resume=resume)

    def trainer(self):
        """Return a trainer that validates nothing."""
        return make_trainer(self.lesson, self.student(), Attempt(), validates=False)


def no_figures(figures, folder):
    """Stand in for `draw_figures`, which takes longer than all the rest of a run."""
    return []


def run_line(kind, folder, start):
    plots.draw_figures = no_figures
    if kind == "recipe":
        run_pico(folder)
    else:
        folder.mkdir(exist_ok=True)
        Pretrained(folder, start=start).train()


def serve(start):
    """Answer each line with the process id of the fork, and with its exit code when it ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        kind, folder = line.split()
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            try:
                run_line(kind, Path(folder), start)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
