from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from soju.core.errors import UserError
from soju.quantization.four_bit import FourBitLinear


def layer_of(weight, bias=None):
    weight = torch.as_tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))
    return layer


def random_layer(outputs, inputs, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return layer_of(torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator))


def correlated_inputs(rows, inputs, *, seed=1):
    """Inputs that are mixtures of a few causes, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, inputs // 4, generator=generator)
    mixed = causes @ torch.randn(inputs // 4, inputs, generator=generator)
    return mixed + 0.1 * torch.randn(rows, inputs, generator=generator)


def test_the_hand_worked_group():
    # from -1 to 14 in 15 steps: scale 1, minimum -1
    quantised = FourBitLinear.from_linear(layer_of([[-1.0, 14.0, 0.4, 6.6]], [0.5]), group_size=4)
    assert quantised.scale_MG.tolist() == [[1.0]]
    assert quantised.minimum_MG.tolist() == [[-1.0]]
    assert quantised.codes_MB.tolist() == [[0 | 15 << 4, 1 | 8 << 4]]
    assert quantised.weight().tolist() == [[-1.0, 14.0, 0.0, 7.0]]
    assert quantised(torch.tensor([[1.0, 1.0, 2.0, 10.0]])).tolist() == [[-1 + 14 + 0 + 70 + 0.5]]


def test_equal_weights_are_kept_and_groups_do_not_touch_each_other():
    quantised = FourBitLinear.from_linear(layer_of([[0.25, 0.25, 0.0, 15.0]]), group_size=2)
    assert quantised.weight().tolist() == [[0.25, 0.25, 0.0, 15.0]]
    assert quantised.scale_MG.tolist()[0][0] == 0


def naive(weight, group_size):
    """Weight by weight, with numpy's float16."""
    result = np.zeros_like(weight, dtype=np.float32)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size].astype(np.float64)
            scale, minimum = np.float16((group.max() - group.min()) / 15), np.float16(group.min())
            for index, value in enumerate(group):
                code = 0 if scale == 0 else min(15, max(0, round((value - float(minimum)) / float(scale))))
                result[row, start + index] = np.float32(code) * np.float32(scale) + np.float32(minimum)
    return result


@given(st.integers(1, 4), st.integers(1, 21), st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_nearest_is_that_of_a_loop_over_weights(outputs, inputs, group_size, seed):
    layer = random_layer(outputs, inputs, seed=seed)
    quantised = FourBitLinear.from_linear(layer, group_size=group_size)
    expected = naive(layer.weight.detach().numpy(), group_size)
    torch.testing.assert_close(quantised.weight(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_no_weight_is_further_off_than_half_a_step():
    layer = random_layer(16, 200)
    quantised = FourBitLinear.from_linear(layer)
    difference = (quantised.weight() - layer.weight).abs()
    step = quantised.scale_MG.float().repeat_interleave(64, dim=1)[:, :200]
    assert (difference <= 0.5 * step + 2e-3 * layer.weight.abs().max()).all()  # and what float16 rounds off


def optimal_brain(weight, inputs, group_size, damping=0.01):
    """The textbook form, row by row: the inverse of the second moments is reduced after each input."""
    moments = inputs.T @ inputs
    moments = moments + damping * np.mean(np.diag(moments)) * np.eye(len(moments))
    result = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        left, inverse = weight[row].copy(), np.linalg.inv(moments)
        for column in range(weight.shape[1]):
            if column % group_size == 0:
                group = left[column : column + group_size]
                scale = float(np.float16((group.max() - group.min()) / 15))
                minimum = float(np.float16(group.min()))
            code = min(15, max(0, round((left[column] - minimum) / scale)))
            result[row, column] = code * scale + minimum
            left -= (left[column] - result[row, column]) / inverse[column, column] * inverse[:, column]
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


def test_compensated_is_the_textbook_procedure():
    layer, inputs = random_layer(5, 24), correlated_inputs(100, 24)
    quantised = FourBitLinear.from_linear(layer, rounding="compensated", inputs=[inputs], group_size=8)
    expected = optimal_brain(layer.weight.detach().double().numpy(), inputs.double().numpy(), 8)
    torch.testing.assert_close(quantised.weight().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_compensated_changes_the_outputs_less_than_nearest_on_correlated_inputs(seed):
    layer, inputs = random_layer(32, 160, seed=seed), correlated_inputs(400, 160, seed=seed + 10)
    held_out = correlated_inputs(400, 160, seed=seed + 10)[200:]
    layers = [
        FourBitLinear.from_linear(layer, rounding="nearest"),
        FourBitLinear.from_linear(layer, rounding="compensated", inputs=[inputs[:150], inputs[150:200]]),
    ]
    nearest, compensated = ((quantised(held_out) - layer(held_out)).square().mean().item() for quantised in layers)
    assert compensated < 0.7 * nearest


def test_calibration_inputs_may_come_in_any_batches_and_shapes():
    layer, inputs = random_layer(4, 16), correlated_inputs(60, 16)
    one = FourBitLinear.from_linear(layer, rounding="compensated", inputs=[inputs])
    two = FourBitLinear.from_linear(layer, rounding="compensated", inputs=[inputs[:20], inputs[20:].view(4, 10, 16)])
    torch.testing.assert_close(one.weight(), two.weight())


def test_inputs_that_are_always_zero_do_no_harm():
    layer, inputs = random_layer(4, 16), correlated_inputs(60, 16)
    inputs[:, 3:9] = 0
    quantised = FourBitLinear.from_linear(layer, rounding="compensated", inputs=[inputs])
    assert torch.isfinite(quantised.weight()).all()
    silent = FourBitLinear.from_linear(layer, rounding="compensated", inputs=[torch.zeros(5, 16)])
    torch.testing.assert_close(silent.weight(), FourBitLinear.from_linear(layer).weight())


def test_a_safetensors_file_brings_back_the_same_layer_in_four_and_a_half_bits(tmp_path):
    layer = random_layer(64, 256)
    quantised = FourBitLinear.from_linear(layer)
    save_file(quantised.state_dict(), tmp_path / "layer.safetensors")
    loaded = FourBitLinear(256, 64)
    assert loaded.load_state_dict(load_file(tmp_path / "layer.safetensors")).missing_keys == []
    inputs = torch.randn(3, 256)
    assert torch.equal(loaded(inputs), quantised(inputs))
    bits = 8 * sum(tensor.nbytes for name, tensor in quantised.state_dict().items() if name != "bias_M")
    assert bits == 4.5 * 64 * 256
    assert (tmp_path / "layer.safetensors").stat().st_size < bits / 8 + 4 * 64 + 600


def test_outputs_keep_the_dtype_of_the_inputs_and_gradients_reach_them():
    quantised = FourBitLinear.from_linear(random_layer(8, 70))
    assert quantised(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16
    inputs = torch.randn(2, 70, requires_grad=True)
    quantised(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, quantised.weight().sum(dim=0).expand(2, -1))
    assert list(quantised.parameters()) == []
    assert "group_size=64" in repr(quantised)


def test_the_layer_that_is_quantised_stays():
    layer = random_layer(4, 10)
    before = layer.weight.clone()
    FourBitLinear.from_linear(layer, rounding="compensated", inputs=[torch.randn(30, 10)])
    assert torch.equal(layer.weight, before)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(UserError, match="not finite or above 65504"):
        FourBitLinear.from_linear(layer_of([[float("nan"), 1.0]]))
    with pytest.raises(UserError, match="not finite or above 65504"):
        FourBitLinear.from_linear(layer_of([[1e6, 1.0]]))
    with pytest.raises(UserError, match="needs calibration inputs"):
        FourBitLinear.from_linear(random_layer(2, 4), rounding="compensated")
    with pytest.raises(UserError, match="group_size is 3"):
        FourBitLinear.from_linear(random_layer(2, 4), group_size=3)
