"""Pico teacher and student of the toy language, and trainings of them that finish in seconds; run as a program by the
kill test: ``python pico_translation.py FOLDER [die_at_step]``."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from transformers import M2M100ForConditionalGeneration, TrainerCallback

from soju.translation.config import ClockedTraining, ValidationConfig, model_config
from soju.translation.degradation import DegradationSettings
from soju.translation.shrink import StudentShape
from soju.translation.toy import toy_pairs
from soju.translation.trainer import SupervisedObjective, Training, train_exactly
from soju.translation.validation import DistillationValidator
from soju.translation.vocabulary import EncodedPairs, Vocabulary, train_vocabulary

PAIRS = toy_pairs(700, seed=3)
TEACHER = StudentShape(d_model=48, layers=2, attention_heads=3, ffn_dim=96)
STUDENT = StudentShape(d_model=32, layers=1, attention_heads=2, ffn_dim=64)
DECODING = ValidationConfig(pairs=24, korean_tokens="kiwi", decoder="generate", max_length=40, draws=200)


def make(shape, vocabulary, *, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return M2M100ForConditionalGeneration(model_config(shape, len(vocabulary), dropout=dropout, max_length=40))


class Scramble(TrainerCallback):
    """Breaks the model at the end of one step: noise on every weight."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))


class Die(TrainerCallback):
    """Kills the process at the end of one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def vocabulary_in(folder):
    if not (folder / "tokenizer.json").is_file():
        train_vocabulary([text for pair in PAIRS for text in (pair.ko, pair.en)], 260).save(folder)
    return Vocabulary.load(folder)


def training(folder, vocabulary, *, steps=240, every=60, callbacks=(), objective=None, **settings):
    torch.set_num_threads(1)
    validator = DistillationValidator(PAIRS[600:], vocabulary, DECODING, folder=folder / "validation")
    given = {
        "max_steps": steps,
        "eval_steps": every,
        "logging_steps": 10,
        "learning_rate": 1e-2,
        "warmup_steps": 10,
        "per_device_train_batch_size": 8,
        "mixed_precision": "off",
        "report_to": [],
    }
    return Training(
        folder=folder,
        make_model=lambda: make(STUDENT, vocabulary, seed=1, dropout=0.1),
        objective=objective or SupervisedObjective(0.1),
        rows=EncodedPairs(PAIRS[:600], vocabulary, max_length=40),
        validator=validator,
        settings=ClockedTraining(**(given | settings)),
        degradation=DegradationSettings(),
        seed=7,
        callbacks=callbacks,
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    extra = [Die(int(sys.argv[2]))] if len(sys.argv) > 2 else []
    train_exactly(training(place, vocabulary_in(place.parent), callbacks=[Scramble(160), *extra]))
