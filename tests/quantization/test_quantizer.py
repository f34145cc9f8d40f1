import pytest
import torch
from torch import nn

from soju.core.errors import UserError
from soju.quantization import FourBitLinear, quantize


class Tied(nn.Module):
    """An embedding, a layer, and an output that shares the embedding's table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.head = nn.Embedding(10, 64), nn.Linear(64, 64), nn.Linear(64, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.layer(self.table(ids)))


def test_linear_layers_are_packed_and_tied_outputs_stay():
    model, ids = Tied(), torch.arange(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = quantize(model, "bits_4")
    assert isinstance(packed.layer, FourBitLinear)
    assert packed.head.weight is packed.table.weight
    expected = Tied()
    with torch.no_grad():
        expected.layer.weight.copy_(packed.layer.weight())
    torch.testing.assert_close(packed(ids), expected(ids))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert packed.layer.codes_MB.nbytes == model.layer.weight.nbytes / 8


def test_sixteen_bits_halve_every_weight():
    small = quantize(Tied(), "bits_16")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_unknown_kinds_and_models_without_linear_layers_are_refused():
    with pytest.raises(UserError, match="choose one of bits_16, bits_4"):
        quantize(Tied(), "bits_3")
    with pytest.raises(UserError, match="no linear layer of its own"):
        quantize(nn.Embedding(3, 4), "bits_4")
