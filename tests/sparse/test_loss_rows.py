"""Losses as rows: what a row gives to the sum and to the log, and that a new loss is one row."""

import pytest
import torch

from soju.sparse.finish import loss_figures
from soju.sparse.losses import LossComponent, NamedLosses, shares
from soju.sparse.terms.losses import LOSSES as TERMS_LOSSES
from soju.sparse.triplets.losses import LOSSES as TRIPLETS_LOSSES


class Settings:
    losses = None


def row(name, weight, value, **more):
    return LossComponent(name, name.upper(), lambda settings, step: weight, lambda batch: value, **more)


def test_a_row_gives_its_value_and_its_weighted_value():
    value, weighted = row("half", 0.5, torch.tensor(4.0)).of(None, None, None)
    assert (value.item(), weighted.item()) == (4.0, 2.0)


def test_a_loss_of_weight_zero_is_logged_only_and_not_even_computed_unless_it_is_watched():
    assert row("off", 0.0, torch.tensor(4.0)).of(None, None, None) == (torch.tensor(4.0), None)
    assert row("off", 0.0, torch.tensor(4.0), watched=False).of(None, None, None) is None
    assert row("absent", 1.0, None).of(None, None, None) is None


def test_a_loss_of_parts_has_a_weight_for_each():
    value, weighted = row("flops", (0.5, 0.25), torch.tensor([4.0, 8.0])).of(None, None, None)
    assert (value.item(), weighted.item()) == (12.0, 4.0)
    assert row("flops", (0.0, 0.0), torch.tensor([4.0, 8.0])).of(None, None, None)[1] == 0


def test_the_weight_follows_settings_and_step_and_the_gradient_is_of_the_weighted_value():
    place = torch.tensor(3.0, requires_grad=True)
    square = LossComponent("square", "", lambda settings, step: settings["half"] * step, lambda batch: batch**2)
    square.of(place, {"half": 0.5}, 4)[1].backward()
    assert place.grad.item() == 12.0  # 0.5 * 4 * 2 * 3


def test_shares_are_of_sizes_and_add_up_to_one():
    found = shares({"up": torch.tensor(3.0), "down": torch.tensor(-1.0)})
    assert {name: value.item() for name, value in found.items()} == {"share_up": 0.75, "share_down": 0.25}


def test_a_new_row_is_in_the_sum_the_log_and_the_plots():
    class More(NamedLosses):
        rows = (row("old", 1.0, torch.tensor(1.0)), row("new", 2.0, torch.tensor(3.0)))

    loss = More(torch.nn.Identity(), Settings, position=lambda: (0, 1))
    assert loss.weighed(None, None) == {"old": 1.0, "new": 6.0}
    assert loss.loss_components == {"old": 1.0, "new": 3.0}
    history = [{"step": 1, "loss": 7.0, "loss_old": 1.0, "loss_new": 3.0, "loss_share_new": 0.8}]
    curves, shares = loss_figures(history, More, caption="")
    assert [(one["name"], one["y"]) for one in curves["series"]] == [
        ("total loss", [7.0]),
        ("OLD", [1.0]),
        ("NEW", [3.0]),
    ]
    assert [(one["name"], one["y"]) for one in shares["series"]] == [("NEW", [0.8])]


@pytest.mark.parametrize("rows", [TERMS_LOSSES, TRIPLETS_LOSSES])
def test_names_and_labels_of_a_mode_differ(rows):
    assert len({row.name for row in rows}) == len({row.label for row in rows}) == len(rows)
