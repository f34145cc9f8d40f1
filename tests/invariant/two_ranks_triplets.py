"""A training on triplets with asked-for sparsity, for `test_ranks_triplets`: ``two_ranks_triplets.py START FOLDER``."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed

from fixtures.pico_triplets import PretrainedOnTriplets
from fixtures.small_bilingual import train_small
from soju.core.files import write_json
from soju.sparse.config import ScratchStudent
from soju.sparse.initial import scratch_student
from soju.training.ranks import join_ranks

BATCH = 8
STEPS = 600
WANTED = {"query": 7, "document": 5}


def save_start(folder):
    """Save a student of one layer that starts as a static encoder; about ten terms of a text are active."""
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32, "max_length": 16}
    settings = ScratchStudent(init="lexical", **shape)
    scratch_student(train_small(), settings, [], similarity="cosine", seed=1).save(str(folder), create_model_card=False)
    return folder


def train(start, folder, *, ranks):
    """Train on eight rows a step together; returns what the controllers ended with."""
    overrides = (
        f"training.per_device_train_batch_size={BATCH // ranks}", "losses.flops=0.01",
        f"training.max_steps={STEPS}", f"training.eval_steps={STEPS}",
        f"sparsity.query_terms={WANTED['query']}", f"sparsity.document_terms={WANTED['document']}",
    )  # fmt: skip
    pico = PretrainedOnTriplets(folder, *overrides, start=start)
    trainer = pico.trainer()
    trainer.train()
    return {side: part.state_dict() for side, part in trainer.loss.controllers.items()}


def main(start, folder):
    torch.set_num_threads(1)
    join_ranks()
    found = train(start, folder, ranks=2)
    write_json(folder / f"rank{PartialState().process_index}.json", found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
