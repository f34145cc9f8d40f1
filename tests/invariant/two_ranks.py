"""What two ranks compute, for `test_ranks`: ``torchrun two_ranks.py START FOLDER``; one rank without torchrun."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import distributed

from fixtures.pico_terms import ROWS, Pretrained
from soju.sparse.losses import flops
from soju.training.ranks import join_ranks

BATCH = 8
ALL_ENGLISH = [row for row in ROWS if any(term.text.isascii() for term in row.terms)][:BATCH]
"""Rows with an English target each, so that every rank has as many of them."""
COST_V = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.5])
ACTIVATION = torch.linspace(-1, 2, BATCH * 5).reshape(BATCH, 5)
UNEVEN = (slice(0, 3), slice(3, BATCH))
"""Texts of each rank."""


def train(start, folder, *, ranks):
    """Train three steps of eight rows together; returns the weights."""
    sizes = (
        f"training.per_device_train_batch_size={BATCH // ranks}",
        "training.max_steps=3",
        "training.logging_steps=1",
    )
    pico = Pretrained(folder, *sizes, "losses.flops=0.1", start=start, terms=ALL_ENGLISH)
    trainer = pico.trainer()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each rank would draw its own
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def penalty(texts, *, across_ranks):
    """Return value and gradient of the penalty on some of the texts."""
    weights_BV = ACTIVATION.clone().requires_grad_()
    value = flops(weights_BV[texts].relu(), term_cost_V=COST_V, across_ranks=across_ranks)
    value.backward()
    return value.detach(), weights_BV.grad


def main(start, folder):
    torch.set_num_threads(1)
    join_ranks()
    rank = PartialState().process_index
    value, gradient_BV = penalty(UNEVEN[rank], across_ranks=True)
    distributed.all_reduce(gradient_BV)
    mean_BV = gradient_BV / 2  # as DDP does
    weights = train(start, folder, ranks=2)
    save_file({"value": value, "gradient": mean_BV, **weights}, folder / f"rank{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
