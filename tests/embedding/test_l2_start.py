import pytest
import torch

from soju.embedding.losses import l2_to_start

WEIGHTS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
START = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[1.0]])}


def test_the_penalty_is_half_the_squared_distance():
    assert l2_to_start(WEIGHTS, START).item() == pytest.approx((1 + 0 + 4) / 2)
    assert l2_to_start(WEIGHTS, START, strength=0.1).item() == pytest.approx(0.25)


def test_the_gradient_points_back_to_the_start():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    l2_to_start({"a": weight}, {"a": START["a"]}, strength=0.5).backward()
    torch.testing.assert_close(weight.grad, 0.5 * (weight.detach() - START["a"]))


def test_it_is_weight_decay_towards_the_start():
    """One step of plain SGD with the penalty is one step of SGD with weight decay on the difference."""
    torch.manual_seed(0)
    start = torch.randn(5)
    weight, difference = (start + 1).requires_grad_(), torch.ones(5, requires_grad=True)
    decayed = torch.optim.SGD([difference], lr=0.1, weight_decay=0.3)
    penalised = torch.optim.SGD([weight], lr=0.1)
    l2_to_start({"w": weight}, {"w": start}, strength=0.3).backward()
    (difference * 0).sum().backward()
    penalised.step()
    decayed.step()
    torch.testing.assert_close(weight.detach() - start, difference.detach())


def test_steps_of_half_precision_are_counted_in_float32():
    start, weight = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    loss = l2_to_start({"w": weight}, {"w": start})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.0078125**2 / 2)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"weights": {}, "start": {}}, "same names"),
        ({"start": {"a": START["a"]}}, r"same names, got \['b'\]"),
        ({"start": {**START, "b": torch.ones(2)}}, r"b is \(1, 1\) and started as \(2,\)"),
        ({"strength": -0.1}, "strength must be >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        l2_to_start(**{"weights": WEIGHTS, "start": START, **arguments})
