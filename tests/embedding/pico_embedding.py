"""Runs of recipe `embedding` of seconds: hidden 16, two layers, sixty of our sample passages, four steps a stage."""

import copy
import json
from importlib.resources import files

from soju.core.config import apply_overrides, validate
from soju.core.files import write_manifest
from soju.core.run import open_run_folder
from soju.embedding.adapters import load_float32
from soju.embedding.config import EmbeddingConfig
from soju.embedding.data import read_embedding_data
from soju.embedding.evaluate import read_evaluation
from soju.embedding.expansion.expand import expand_model
from soju.embedding.recipe import read_run, run
from soju.embedding.retention import RetentionCheck
from soju.embedding.scratch_base import make_scratch_base
from soju.embedding.stages import STAGES

STAGE = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "dropout": 0.3,
    "mixed_precision": "off",
    "eval_steps": 2,
    "logging_steps": 1,
    "max_length": 16,
    "save_total_limit": 9,
}
PICO = {
    "recipe": "embedding",
    "name": "pico",
    "data": {"passages": ["passages.jsonl"]},
    "base": {
        "kind": "scratch",
        "vocabulary": 600,
        "korean_share": 0.1,
        "donor_vocabulary": 500,
        "hidden_size": 16,
        "layers": 2,
        "heads": 2,
        "key_value_heads": 1,
        "intermediate_size": 32,
        "max_length": 24,
        "distillation": {"max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2},
    },
    "stages": [0, 1, 2, 3],
    "expansion": {"order": "donor", "speed": False},
    "stage1": STAGE,
    "stage2": {**STAGE, "adapters": {"kind": "linear", "hidden": 4}},
    "stage3": {**STAGE, "blocks": 1, "learning_rate": 1e-4},
    "retention": {
        "held_out": 0.2,
        "max_pairs": 16,
        "max_sentences": 8,
        "english_drop": 1,
        "korean_drop": 1,
        "min_cosine": 0,
    },
    "evaluation": {"resamples": 100, "timed_texts": None},
}


def write_passages(folder, count=60):
    """Write the first sample passages; cut short, so that tokenizers and batches stay small."""
    source = str(files("soju") / "samples/passages.train.jsonl")
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    for row in rows:
        row["ko"], row["en"] = row["ko"][:60], row["en"][:100]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "passages.jsonl").write_text(text, encoding="utf-8")
    return folder


def embedding_config(root, *overrides, **values):
    plain = {**copy.deepcopy(PICO), **values}
    plain["data"] = {"root": str(root), **plain["data"]}
    return validate(apply_overrides(plain, overrides), EmbeddingConfig, place="pico")


def run_embedding(folder, root, *overrides, resume=None, **values):
    """Run the recipe into a new folder, or go on with the run in it."""
    config = embedding_config(root, *overrides, **values)
    begun = (folder / "config.yaml").is_file()
    run_dir = open_run_folder(folder, config, "as given", resumes=begun)
    data, evaluation = read_run(config)
    return run(config, run_dir, data=data, evaluation=evaluation, resume=resume)


class PicoStages:
    """An expanded base to run single stages from."""

    def __init__(self, root, folder):
        self.root = write_passages(root)
        self.folder = folder
        config = embedding_config(root)
        self.data = read_embedding_data(config, measured=read_evaluation(config.evaluation).all_texts())
        self.base, self.donor = make_scratch_base(config.base, self.data, folder, seed=config.seed)
        self.expanded = expand_model(str(self.base), str(self.donor), folder / "expanded", speed=False)
        write_manifest(self.expanded)

    def stage(self, name, folder, *overrides, start=None):
        config = embedding_config(self.root, *overrides)
        data = read_embedding_data(config)
        return STAGES[name](name, getattr(config, name), config, data, start or self.expanded, self.base, folder)

    def check(self, stage):
        data = stage.data
        return RetentionCheck(
            data.watched_korean, data.watched_english, load_float32(self.base), stage.config.retention
        )
