"""Runs of mode ``triplets`` that take a second: hidden 32, one layer, triplets made of twelve sentence pairs."""

import copy

from soju.core.run import open_run_folder
from soju.data.log import ReadLog
from soju.data.rows import TripletRow
from soju.sparse.data import RunData, TrainingData
from soju.sparse.initial import plain_vocabulary
from soju.sparse.neural import make_trainer, train
from soju.sparse.recipe import RECIPE
from soju.sparse.splade import SpladeEncoder
from soju.sparse.triplets.training import TripletsLesson
from soju.training.rollback import Attempt
from sparse.pico_terms import config_of
from sparse.small_bilingual import PAIRS, TERMS

SCRATCH = {
    "recipe": "splade",
    "mode": "triplets",
    "name": "pico",
    "data": {"pairs": ["unused.tsv"], "triplets": ["unused.jsonl"]},
    "student": {
        "init": "lexical",
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "intermediate_size": 32,
        "max_length": 16,
        "static": {"tokenizer": {"min_count": 1, "sub_words": 100}},
    },
    "similarity": "cosine",
    "training": {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "mixed_precision": "off",
        "eval_steps": 3,
        "logging_steps": 2,
        "max_drop": 0.9,
        "patience": None,
    },
    "evaluation": {"bootstrap_samples": 100, "latency_queries": 2},
}


def _triplets():
    rows = []
    for place, pair in enumerate(PAIRS):
        other = PAIRS[(place + 3) % len(PAIRS)]
        hardness = ("easy", "medium", "hard")[place % 3]
        rows.append(TripletRow(pair.ko, pair.en, other.en, "cross_lingual", hardness))
        rows.append(TripletRow(pair.en, pair.en + " today", other.en, "monolingual", hardness))
    for place, term in enumerate(TERMS):
        other = TERMS[(place + 2) % len(TERMS)]
        rows.append(TripletRow(term.ko, term.terms[0].text, other.terms[0].text, "single_term", "hard"))
    return rows


TRIPLETS = _triplets()
DEV = [
    TripletRow("의사가 학교에 갔다", "the doctor went to school", "the sea is big", "cross_lingual", "easy"),
    TripletRow("백신이 크다", "the vaccine is big", "a student reads a book", "cross_lingual", "hard"),
    TripletRow("바다", "sea", "book", "single_term", "easy"),
    TripletRow("의사", "doctor", "school", "single_term", "easy"),
]


def triplets_config(*overrides, **values):
    return config_of({**copy.deepcopy(SCRATCH), **values}, *overrides)


def triplets_data():
    training = TrainingData(
        PAIRS, TERMS, [], [], {"unused": len(TERMS)}, ReadLog(), {}, triplets=list(TRIPLETS), dev_triplets=list(DEV)
    )
    return RunData(training, [])


def run_triplets(folder, *overrides, resume=None):
    """Run the whole recipe on objects into a new folder, or go on with the run in it."""
    config = triplets_config(*overrides)
    begun = (folder / "config.yaml").is_file()
    run_dir = open_run_folder(folder, config, "as given", resumes=begun)
    return RECIPE.train(config, run_dir, data=triplets_data(), resume=resume or begun, workers=1)


class PretrainedOnTriplets:
    """A lesson of mode ``triplets`` for a masked language model with its own vocabulary."""

    def __init__(self, folder, *overrides, start, triplets=TRIPLETS):
        self.folder = folder
        self.start = start
        student = {"init": "pretrained", "model": str(start), "max_length": 16}
        self.config = triplets_config(*overrides, student=student, data={"triplets": ["unused.jsonl"]})
        self.vocabulary = plain_vocabulary(self.student().tokenizer)
        training = TrainingData([], [], [], [], {}, ReadLog(), {}, triplets=triplets, dev_triplets=DEV)
        self.lesson = TripletsLesson(self.config, training, self.vocabulary, folder)
        self.rows, self.dev = self.lesson.rows, self.lesson.dev

    def student(self):
        return SpladeEncoder(self.start, max_seq_length=16, similarity_fn_name="cosine", device="cpu")

    def train(self, *, resume=None):
        return train(self.lesson, self.student, resume=resume)

    def trainer(self):
        """Return a trainer that validates nothing."""
        return make_trainer(self.lesson, self.student(), Attempt(), validates=False)
