"""State beside the model comes back bit by bit, from JSON and safetensors only."""

import pytest
import torch

from soju.core.errors import UserError
from soju.training.state import read_extra_state, write_extra_state


class Part:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


def test_numbers_texts_and_tensors_come_back(tmp_path):
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t()  # not contiguous
    write_extra_state(tmp_path, {"a": Part(x=0.1, y=[1, None], z="나"), "b": Part(m=tensor, n=torch.tensor(2))})
    a, b = Part(), Part()
    read_extra_state(tmp_path, {"a": a, "b": b})
    assert a.state == {"x": 0.1, "y": [1, None], "z": "나"}
    assert torch.equal(b.state["m"], tensor)
    assert b.state["m"].dtype == torch.bfloat16
    assert b.state["n"] == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_torch_scheduler_and_module_can_be_parts(tmp_path):
    write_extra_state(tmp_path, {"head": torch.nn.Linear(2, 1)})
    head = torch.nn.Linear(2, 1)
    read_extra_state(tmp_path, {"head": head})
    again = torch.nn.Linear(2, 1)
    read_extra_state(tmp_path, {"head": again})
    assert torch.equal(head.weight, again.weight)


def test_other_parts_than_were_written_are_refused(tmp_path):
    write_extra_state(tmp_path, {"gamma": Part(x=1)})
    with pytest.raises(UserError, match="holds the state of gamma, this run has nothing"):
        read_extra_state(tmp_path, {})
