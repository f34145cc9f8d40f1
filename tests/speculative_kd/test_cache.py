"""The cache with one length a row, and the models that are refused."""

import pytest
import torch
from pico_models import pico
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from soju.core.errors import UserError
from soju.speculative_kd.cache import Reader, RowCache

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@torch.no_grad()
def test_rows_of_different_lengths_read_as_if_alone():
    model = pico("llama")
    reader = Reader(model, "student")
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    cache = reader.cache(3, slots=4)
    reader.prefill(cache, rows)
    assert cache.lengths == [4, 1, 2]
    found = reader.read(torch.tensor([[row[-1], 20, 21] for row in rows]), cache)
    for slot, row in enumerate(rows):
        expected = model.model(torch.tensor([[*row, 20, 21]])).last_hidden_state[0, -3:]
        torch.testing.assert_close(found[slot], expected)
    assert cache.lengths == [7, 4, 5]


@torch.no_grad()
def test_tokens_are_taken_back_by_a_smaller_length():
    model = pico("qwen3")
    reader = Reader(model, "student")
    cache = reader.cache(2, slots=16)
    reader.read(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), cache)
    cache.lengths = [1, 3]
    found = reader.read(torch.tensor([[20, 21], [22, 23]]), cache)
    torch.testing.assert_close(found[0], model.model(torch.tensor([[5, 20, 21]])).last_hidden_state[0, 1:])
    torch.testing.assert_close(found[1], model.model(torch.tensor([[9, 10, 11, 22, 23]])).last_hidden_state[0, 3:])


@torch.no_grad()
def test_rows_leave_and_the_cache_grows():
    model = pico("llama")
    reader = Reader(model, "student")
    cache = reader.cache(3, slots=2, most=11)
    texts = [[1, 2], [3, 4], [5, 6]]
    reader.read(torch.tensor(texts), cache)
    cache.keep([0, 2])
    assert cache.lengths == [2, 2]
    assert cache.layers[0].keys.shape[0] == 2
    texts = [texts[0], texts[2]]
    for token in range(10, 19):
        found = reader.read(torch.tensor([[token], [token]]), cache)
        texts = [[*text, token] for text in texts]
        for slot, text in enumerate(texts):
            torch.testing.assert_close(found[slot, -1], model.model(torch.tensor([text])).last_hidden_state[0, -1])
    assert cache.slots == 11  # 2, 4, 8, then no more than asked for


def test_a_fixed_cache_says_when_it_is_full():
    cache = RowCache(1, 2, slots=4, device=torch.device("cpu"), fixed=True)
    with pytest.raises(RuntimeError, match="fixed cache of 4 slots was asked for 5"):
        cache.announce(5)


def test_it_is_a_cache_of_transformers():
    cache = RowCache(3, 2, slots=8, device=torch.device("cpu"))
    cache.lengths = [2, 5]
    cache.announce(2)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.get_mask_sizes(2, 0)) == (5, 8, (7, 0))
    assert cache.is_compileable
    assert not any(cache.is_sliding)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "layers of the kind sliding_attention"),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
            ),
            "layers of the kind sliding_attention",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)), "layers of the kind sliding_attention"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)),
            "does not (read through|keep keys)|layers of the kind",
        ),
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
            "one length a row|read",
        ),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), "changes its logits"),
    ],
    ids=["sliding", "partly sliding", "alternating", "state space", "alibi", "scaled logits"],
)
def test_models_that_cannot_be_read_row_by_row_are_refused(model, match):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=match) as caught:
        Reader(model().eval(), "teacher")
    assert str(caught.value).startswith("teacher ")
    assert "such as Llama or Qwen3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
        ),
    ],
    ids=["mistral", "qwen2", "gpt2"],
)
def test_other_full_attention_decoders_are_read(model):
    torch.manual_seed(0)
    assert Reader(model().eval(), "student").layers == 2


def test_an_encoder_is_refused():
    model = pico("llama").model
    with pytest.raises(UserError, match="no decoder with an output embedding"):
        Reader(model, "student")
