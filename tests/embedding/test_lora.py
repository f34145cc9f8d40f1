import sys

import pytest
import torch

from fixtures.tiny_encoders import KINDS, batch, tiny_encoder
from soju.core.errors import MissingExtraError, UserError
from soju.embedding.adapters import add_lora, merge_lora

TEXTS = [[3, 25, 26], [7, 8]]


@torch.no_grad()
def states(model):
    return model(**batch(TEXTS)).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_as_it_was_learns_and_is_merged_into_a_plain_one(kind):
    pytest.importorskip("peft")
    model, plain = tiny_encoder(kind), tiny_encoder(kind)
    parameters = add_lora(model, r=2)
    assert torch.equal(states(model), states(plain))
    model(**batch(TEXTS)).last_hidden_state.sin().sum().backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    trained = states(model)
    assert not torch.allclose(trained, states(plain), atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(states(model), trained, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_only_the_layers_that_were_named_get_updates():
    pytest.importorskip("peft")
    model = tiny_encoder()
    add_lora(model, r=2, layers=(1,))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6
    assert all(name.startswith("layers.1.mlp.") for name in trained)


def test_what_cannot_be_done_is_refused():
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="among 0 to 1"):
        add_lora(tiny_encoder(), layers=(2,))
    with pytest.raises(UserError, match="has no list of layers"):
        add_lora(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="no LoRA to merge"):
        merge_lora(tiny_encoder())


def test_without_peft_the_message_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'soju\[lora\]'"):
        add_lora(tiny_encoder())
