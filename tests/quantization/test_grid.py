from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear, mse_loss
from transformers import M2M100Config, M2M100ForConditionalGeneration

from soju.core.errors import UserError
from soju.quantization.grid import QatLinear, fake_quantise, prepare, quantise, row_scale


def test_the_hand_worked_rows():
    values = torch.tensor([[1.0, -0.5, 0.26], [0.0, 0.0, 0.0], [-254.0, 2.0, 3.0]])
    codes, scale = quantise(values)
    assert scale.tolist() == [[127.0], [1.0], [0.5]]
    assert codes.tolist() == [[127, -64, 33], [0, 0, 0], [-127, 1, 2]]  # -63.5 and 1.5 go to the even number
    torch.testing.assert_close(fake_quantise(values), codes / scale)


def test_the_seven_bit_grid_has_63_levels():
    codes, scale = quantise(torch.tensor([[1.0, -0.5]]), levels=63)
    assert (codes.tolist(), scale.tolist()) == ([[63, -32]], [[63.0]])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 20), st.sampled_from([127, 63]))
def test_codes_are_those_of_a_loop(rows, columns, seed, levels):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, _ = quantise(values, levels)
    for row, row_codes in zip(values.numpy(), codes, strict=True):
        scale = np.float32(levels) / np.abs(row).max()
        assert row_codes.tolist() == [int(np.rint(value * scale)) for value in row]


def test_weights_are_those_that_ctranslate2_writes():
    specs = pytest.importorskip("ctranslate2.specs.common_spec")
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] *= 1e-30
    spec = specs.LinearSpec()
    spec.weight = weight.numpy().copy()  # it overwrites what it is given
    spec.validate()
    spec.optimize(quantization="int8")
    codes, scale = quantise(weight)
    np.testing.assert_array_equal(spec.weight.numpy(), codes.numpy())
    np.testing.assert_array_equal(spec.weight_scale.numpy(), scale[:, 0].numpy())


def test_the_gradient_is_the_identity():
    values = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    fake_quantise(values).backward(upstream)
    assert torch.equal(values.grad, upstream)


def test_what_is_on_the_grid_stays_there():
    once = fake_quantise(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(fake_quantise(once), once, rtol=1e-6, atol=1e-7)


def test_half_precision_is_rounded_in_single_precision():
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(fake_quantise(values), fake_quantise(values.float()).bfloat16())
    assert torch.isfinite(row_scale(torch.tensor([[1e-40]]))).all()


def test_the_layer_is_the_integer_product_of_its_codes():
    layer = nn.Linear(24, 10)
    inputs = torch.randn(6, 24)
    (weights, weight_scale), (activations, activation_scale) = quantise(layer.weight), quantise(inputs)
    whole = activations.long() @ weights.long().T
    expected = whole / (activation_scale * weight_scale.T) + layer.bias
    torch.testing.assert_close(QatLinear.from_linear(layer)(inputs), expected)


def test_gradients_reach_weight_bias_and_inputs_as_in_a_layer_with_rounded_factors():
    layer = QatLinear.from_linear(nn.Linear(5, 3))
    inputs = torch.randn(4, 5, requires_grad=True)
    layer(inputs).square().sum().backward()
    rounded_inputs = fake_quantise(inputs).detach().requires_grad_()
    rounded_weight = fake_quantise(layer.weight).detach().requires_grad_()
    linear(rounded_inputs, rounded_weight, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(inputs.grad, rounded_inputs.grad)
    torch.testing.assert_close(layer.weight.grad, rounded_weight.grad)
    assert layer.bias.grad is not None


def pico_model():
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32), ("layerdrop", 0.0))}  # fmt: skip
    return M2M100ForConditionalGeneration(M2M100Config(vocab_size=40, d_model=16, **sizes)).eval()


def logits(model):
    ids = torch.arange(4, 12).view(2, 4)
    return model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits


def test_a_prepared_model_keeps_names_and_ties_and_is_taken_back_without_a_trace():
    model = pico_model()
    names, before = list(model.state_dict()), logits(model)
    prepared = prepare(model)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.shared.weight
    assert sum(isinstance(module, QatLinear) for module in model.modules()) == 1 + 4 + 2 + 8 + 2
    assert 0 < (logits(model) - before).abs().max() < 0.1 * before.abs().max()
    with pytest.raises(UserError, match="prepared already"):
        prepare(model)
    prepared.remove()
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, QatLinear) for module in model.modules())


def test_a_prepared_model_is_the_model_with_rounded_weights_and_inputs():
    model = pico_model()
    prepared = prepare(model)
    expected = logits(model)
    prepared.remove()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.ndim == 2}.values():
            parameter.copy_(fake_quantise(parameter))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, inputs: (fake_quantise(inputs[0]),))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_saved_prepared_model_loads_as_a_stock_one(tmp_path):
    model = pico_model()
    prepared = prepare(model)
    model.save_pretrained(tmp_path)
    prepared.remove()
    loaded = M2M100ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_training_on_the_grid_takes_back_most_of_what_rounding_costs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 4, generator=generator) @ torch.randn(4, 32, generator=generator)  # correlated
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    wanted = model(inputs).detach()
    prepare(model, levels=7)
    rounded = mse_loss(model(inputs), wanted).item()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / 150)
        optimiser.zero_grad()
        mse_loss(model(inputs), wanted).backward()
        optimiser.step()
    assert mse_loss(model(inputs), wanted).item() < 0.5 * rounded


@pytest.mark.parametrize("levels", [0, 128])
def test_levels_beyond_int8_are_refused(levels):
    with pytest.raises(UserError, match="give 1 to 127"):
        quantise(torch.ones(1, 1), levels)
    with pytest.raises(UserError, match="give 1 to 127"):
        prepare(nn.Linear(2, 2), levels=levels)
