"""Trainers of recipe ``speculative_kd`` that finish in a second, and a program that trains one to its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from pico_models import pair
from safetensors.torch import save_file

from soju.speculative_kd.config import DivergenceSettings, RolloutSettings
from soju.speculative_kd.controller import Costs
from soju.speculative_kd.data import Example
from soju.speculative_kd.trainer import Lesson, SkdTrainer, skd_arguments, write_teacher_texts
from soju.training.checkpoints import list_checkpoints
from soju.training.ranks import join_ranks

EOS = (3,)
COSTS = Costs(rows=4, student=0.5, blocks=((1, 1.0), (8, 1.5)), teacher_seconds=0.01)


def examples(rows=12, *, canary=None):
    """Questions whose ids are below 60; knowledge holds the canary, which stands in no question."""
    rng = np.random.default_rng(0)
    made = []
    for row in range(rows):
        query = [*rng.integers(4, 60, rng.integers(2, 8)).tolist(), 1]
        knowledge = [*rng.integers(60, 90, rng.integers(4, 9)).tolist(), *([canary] if canary else [])]
        made.append(Example(f"en/{row}", query, query, [*knowledge, *query], [61, 62, *query], "en", f"c{row % 2}"))
    return made


def lesson(method="lupi_skd", *, rows=12, mix=0.7, dtype=torch.float64, start=None, slots=0, made=None, **rollout):
    student, teacher = pair(mix, dtype=dtype)
    settings = {"gamma": 5, "max_new_tokens": 12, "eos": EOS, "seed": 5, "min_prob": 0.02, **rollout}
    general = [Example(f"general/{n}", [n + 5, 1], [n + 5, 1], [n + 5, 1], None, "en", "general") for n in range(4)]
    return student, Lesson(
        made or examples(rows),
        teacher,
        method,
        RolloutSettings(**settings),
        DivergenceSettings(),
        general=general if slots else (),
        slots=slots,
        start=start,
    )


def make(folder, method="lupi_skd", *, batch=2, accumulation=2, epochs=2, cls=SkdTrainer, built=None, **more):
    """Return a trainer in a folder; `built` is what `lesson` returned, else `more` goes there."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {key: more.pop(key) for key in ("save_steps", "learning_rate", "logging_steps") if key in more}
    student, given = built or lesson(method, **more)
    if not (folder / "costs.json").exists():
        COSTS.write(folder / "costs.json")
    arguments = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": epochs,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": 100,
        "report_to": [],
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    texts = write_teacher_texts(given, folder / "texts.json") if given.way.text == "teacher" else None
    return cls(
        lesson=given,
        model=student,
        args=skd_arguments(arguments),
        history=folder / "history.jsonl",
        costs=folder / "costs.json",
        texts=texts,
    )


def main(folder, *settings):
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join_ranks()
    values = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    trainer = make(Path(folder), **values)
    trainer.train(bool(list_checkpoints(Path(folder) / "checkpoints")) or None)
    if int(os.environ.get("RANK", "0")) == 0:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, f"{folder}/final.safetensors"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
