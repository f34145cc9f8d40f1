"""The sparsity that was asked for comes out the same on two ranks as on one."""

import json

import numpy as np
import pytest
import torch

from invariant import two_ranks_triplets
from invariant.test_ranks import TESTS, torchrun
from soju.core.files import read_json_lines

LAST = 300
"""Steps at the end that are averaged: eight texts of a batch say little."""


def active_terms(folder, side):
    rows = [row for row in read_json_lines(folder / "history.jsonl") if "loss" in row]
    return np.mean([row[f"loss_active_{side}"] for row in rows if row["step"] > two_ranks_triplets.STEPS - LAST])


@pytest.mark.slow
def test_two_ranks_end_with_the_active_terms_of_one(tmp_path):
    torch.set_num_threads(1)
    start = two_ranks_triplets.save_start(tmp_path / "start")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    program = TESTS / "invariant" / "two_ranks_triplets.py"
    said = torchrun(str(program), str(start), str(tmp_path / "two"), cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    two_ranks_triplets.train(start, tmp_path / "one", ranks=1)
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]  # the controllers of all ranks are one
    for side, wanted in two_ranks_triplets.WANTED.items():
        one, two = (active_terms(tmp_path / name, side) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=0.05)
        assert one == pytest.approx(wanted, rel=0.1)
