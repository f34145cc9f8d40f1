import pytest
import torch
from torch import nn

from fixtures.tiny_encoders import KINDS, batch, tiny_encoder
from soju.core.errors import UserError
from soju.embedding.adapter_modules import AdapterSettings, Bottleneck
from soju.embedding.adapters import (
    adapter_parameters,
    add_adapters,
    describe_adapters,
    fold_adapters,
    parameters_by_layer,
)

ADAPTERS = ("bottleneck", "gated", "parallel", "linear")
TEXTS = [[3, 25, 26, 29, 2], [25, 4], [7]]


def adapted(kind, adapter, *, trained=True, **settings):
    """Return an encoder with adapters, away from where they start when `trained`."""
    model = tiny_encoder(kind)
    add_adapters(model, AdapterSettings(adapter, **{"hidden": 6} | settings))
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def states(model, texts=TEXTS, **padding):
    """Return the hidden state of each text's last token."""
    inputs = batch(texts, **padding)
    hidden = model(**inputs).last_hidden_state
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(dim=1)
    return hidden[torch.arange(len(texts)), last]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_as_it_was_bit_for_bit_and_then_changes(kind, adapter):
    expected = states(tiny_encoder(kind))
    assert torch.equal(states(adapted(kind, adapter, trained=False)), expected)
    assert not torch.allclose(states(adapted(kind, adapter)), expected, atol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_into_adapters_only(kind, adapter):
    model = adapted(kind, adapter).train()
    model(**batch(TEXTS)).last_hidden_state.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".adapter." in name), name


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("kind", "left"), [("qwen3", True), ("qwen3", False), ("bert", False)])
def test_neither_padding_nor_other_texts_change_a_text(kind, left, adapter):
    model = adapted(kind, adapter)
    alone = torch.cat([states(model, [text]) for text in TEXTS])
    together = states(model, left=left)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states(model, width=11, left=left), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states(model, TEXTS[::-1], left=left), together.flip(0), atol=1e-5, rtol=1e-5)


def test_the_gate_of_a_token_is_its_own():
    torch.manual_seed(0)
    module = Bottleneck(4, AdapterSettings("gated", hidden=3))
    nn.init.normal_(module.token_gate.weight)
    nn.init.normal_(module.up.weight)
    hidden = torch.randn(2, 5, 4)
    other = hidden.clone()
    other[:, 1:] = 0
    assert torch.equal(module(hidden)[:, 0], module(other)[:, 0])


def test_bottleneck_by_hand():
    module = Bottleneck(2, AdapterSettings("bottleneck", hidden=1))
    for parameter, value in zip(
        module.parameters(), ([2.0], [[1.0, 1.0]], [0.0], [[1.0], [0.0]], [0.0, 1.0]), strict=True
    ):
        parameter.data = torch.tensor(value)
    # down: 1 + 3 = 4; gelu(4) = 3.999873; up: (3.999873, 1); gate 2.
    torch.testing.assert_close(module(torch.tensor([1.0, 3.0])), torch.tensor([1 + 2 * 3.999873, 3 + 2.0]))


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("adapter", ["linear", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_adapters_leave_a_stock_model_with_the_same_states(tmp_path, kind, adapter, layers):
    model = adapted(kind, adapter, layers=layers)
    expected, names = states(model), set(tiny_encoder(kind).state_dict())
    fold_adapters(model)
    torch.testing.assert_close(states(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == names
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny_encoder(kind).modules()}
    torch.testing.assert_close(states(loaded), expected, atol=1e-5, rtol=1e-5)
    assert loaded.config.intermediate_size == (30 if adapter == "parallel" else 24)


@pytest.mark.parametrize("adapter", ["bottleneck", "gated"])
def test_what_cannot_be_folded_is_refused_and_left_whole(adapter):
    model = adapted("qwen3", adapter)
    expected = states(model)
    with pytest.raises(UserError, match="only linear and parallel adapters can be folded"):
        fold_adapters(model)
    assert torch.equal(states(model), expected)
    with pytest.raises(UserError, match="no adapters to fold"):
        fold_adapters(tiny_encoder())


@pytest.mark.parametrize(
    ("kind", "adapter", "a_layer"),
    [
        ("qwen3", "bottleneck", 2 * 16 * 6 + 6 + 16 + 1),
        ("qwen3", "gated", 2 * 16 * 6 + 6 + 16 + 16 + 1),
        ("qwen3", "linear", 2 * 16 * 6),
        ("qwen3", "parallel", 3 * 16 * 6),
        ("bert", "parallel", 2 * 16 * 6 + 6),
    ],
)
def test_parameters_are_counted_in_words(kind, adapter, a_layer):
    model = adapted(kind, adapter, layers=(1,))
    whole = sum(parameter.numel() for parameter in model.parameters())
    expected = f"adapters in 1 of 2 layers: {a_layer:,} of {whole:,} parameters ({a_layer / whole:.2%})"
    assert describe_adapters(model) == expected
    assert list(parameters_by_layer(model)) == [1]


def test_dropout_is_for_training_only():
    model = adapted("qwen3", "parallel", dropout=0.5)
    assert torch.equal(states(model), states(model))
    model.train()
    assert not torch.equal(states(model), states(model))


def test_the_seed_makes_the_adapters_and_the_callers_dice_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    weights = []
    for seed in (0, 0, 1):
        model = tiny_encoder()
        torch.manual_seed(5)
        add_adapters(model, AdapterSettings(hidden=2), seed=seed)
        assert torch.equal(torch.rand(3), expected)
        weights.append(torch.cat([parameter.flatten() for parameter in adapter_parameters(model)]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adapters_stay_float32_in_a_bfloat16_model():
    model = tiny_encoder().bfloat16()
    expected = states(model)
    add_adapters(model, AdapterSettings(hidden=2))
    assert torch.equal(states(model), expected)
    assert {parameter.dtype for parameter in adapter_parameters(model)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch(TEXTS)).last_hidden_state.float().sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter_parameters(model))


@pytest.mark.parametrize("layers", [(2,), (-1,), (), (0, 0)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(UserError, match="must be different ones of 0 to 1"):
        add_adapters(tiny_encoder(), AdapterSettings(layers=layers))


def test_wrong_settings_and_models_are_refused():
    with pytest.raises(ValueError, match="none of bottleneck"):
        AdapterSettings("serial")
    with pytest.raises(ValueError, match="hidden >= 1"):
        AdapterSettings(hidden=0)
    with pytest.raises(ValueError, match="dropout in"):
        AdapterSettings(dropout=1.0)
    with pytest.raises(UserError, match="has adapters already"):
        add_adapters(adapted("qwen3", "linear"), AdapterSettings())
    with pytest.raises(UserError, match="Linear has no list of layers named as in Qwen3"):
        add_adapters(nn.Linear(2, 2), AdapterSettings())
    strange = nn.Module()
    strange.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UserError, match="layers without linear layers of these names: Qwen3, Llama: mlp"):
        add_adapters(strange, AdapterSettings())
