"""A seeded collator gives the same batch for the same rows and epoch, whatever was collated before."""

import random

import numpy as np
import pytest
import torch

from soju.training.sampling import SeededCollator
from soju.training.state import kept_random_state


def draw(rows):
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


ROWS = [{"text": "가", "ids": torch.tensor([1, 2]), "more": np.array([1.5]), "raw": b"\x00"}]


def test_same_rows_and_epoch_give_the_same_draw_and_anything_else_another():
    collate = SeededCollator(draw, seed=1)
    first = collate(ROWS)
    draw(None)
    assert collate(ROWS) == first
    assert SeededCollator(draw, seed=1)(ROWS) == first
    assert SeededCollator(draw, seed=2)(ROWS) != first
    assert collate([{**ROWS[0], "ids": torch.tensor([1, 3])}]) != first
    collate.set_epoch(1)
    assert collate(ROWS) != first
    collate.set_epoch(0)
    assert collate(ROWS) == first


def test_the_global_generators_do_not_move():
    with kept_random_state():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        expected = draw(None)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        SeededCollator(draw, seed=1)(ROWS)
        assert draw(None) == expected


def test_a_block_that_fails_leaves_the_generators_too():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), kept_random_state():
        raise ZeroDivisionError(torch.rand(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_objects_without_a_value_do_not_bring_their_address_into_the_seed():
    class Picture:
        pass

    collate = SeededCollator(draw, seed=1)
    assert collate([{"image": Picture()}]) == collate([{"image": Picture()}])
