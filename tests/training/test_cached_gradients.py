"""Losses over a batch in mini-batches: the same values and gradients as in one piece."""

import pytest
import torch
from torch import nn

from soju.training.cached_gradients import cached_losses


class Encoder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(6, 7)
        self.seen = []

    def forward(self, features):
        self.seen.append(tuple(features["input_ids"].shape))
        mask = features["attention_mask"][..., None]
        hidden = self.out(self.dropout(self.embedding(features["input_ids"])))
        return hidden.masked_fill(mask == 0, -1e4).amax(dim=1)


def features(texts=9):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 6, (texts,), generator=generator)
    mask = (torch.arange(5)[None] < lengths[:, None]).long()
    return {"input_ids": torch.randint(0, 20, (texts, 5), generator=generator) * mask, "attention_mask": mask}


def in_batch(vectors):
    scores = vectors @ vectors.T
    return {"contrast": scores.logsumexp(dim=1).mean(), "size": 0.1 * vectors.square().sum()}


def gradients(encoder):
    return [parameter.grad.clone() for parameter in encoder.parameters()]


@pytest.mark.parametrize("mini_batch", [1, 2, 4, 9, 100])
def test_values_and_gradients_are_those_of_the_whole_batch(mini_batch):
    whole, parts = Encoder(), Encoder()
    expected = in_batch(whole(features()))
    sum(expected.values()).backward()
    found = cached_losses(parts, features(), in_batch, mini_batch=mini_batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value.detach())
    sum(found.values()).backward()
    for ours, theirs in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_scaled_loss_scales_the_gradients():
    one, scaled = Encoder(), Encoder()
    sum(cached_losses(one, features(), in_batch, mini_batch=2).values()).backward()
    (sum(cached_losses(scaled, features(), in_batch, mini_batch=2).values()) * 8).backward()
    for ours, theirs in zip(gradients(scaled), gradients(one), strict=True):
        torch.testing.assert_close(ours, 8 * theirs)


def test_dropout_draws_the_same_in_both_passes_and_the_generator_goes_on_as_after_one():
    encoder = Encoder(dropout=0.5).train()
    torch.manual_seed(5)
    drawn = []
    encoder.dropout.register_forward_hook(lambda module, inputs, output: drawn.append(output.detach() == 0))
    losses = cached_losses(encoder, features(), in_batch, mini_batch=4)
    after = torch.get_rng_state()
    sum(losses.values()).backward()
    first, second = drawn[:3], drawn[3:]
    assert len(second) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), after)


def test_no_mini_batch_is_larger_than_asked_and_columns_that_only_pad_are_gone():
    encoder = Encoder()
    cached_losses(encoder, features(), in_batch, mini_batch=2)
    widths = features()["attention_mask"].sum(dim=1)
    assert [shape[0] for shape in encoder.seen] == [2, 2, 2, 2, 1]
    assert [shape[1] for shape in encoder.seen] == [int(widths[i : i + 2].max()) for i in range(0, 9, 2)]


def test_without_gradients_the_losses_are_plain_numbers():
    with torch.no_grad():
        found = cached_losses(Encoder(), features(), in_batch, mini_batch=2)
    assert not any(value.requires_grad for value in found.values())
