from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, pad
from toy_translation import END, PAD, batch, logits, pico_config, pico_model, trained_teacher
from transformers import M2M100ForConditionalGeneration

from soju.core.errors import ConfigError
from soju.translation.shrink import StudentShape, _evenly, _fit_norm, choose, initial_student, measure_activity

SAME = StudentShape(d_model=48, layers=2, attention_heads=3, ffn_dim=96)
SMALL = StudentShape(d_model=32, layers=1, attention_heads=2, ffn_dim=48)
PAIRS = [batch(32, seed=seed) for seed in range(8)]
HELD_OUT = batch(64, seed=77)


@pytest.fixture(scope="module")
def teacher():
    return trained_teacher()


@torch.no_grad()
def divergence(teacher, student):
    theirs, ours = (log_softmax(logits(model, HELD_OUT), -1) for model in (teacher, student))
    return kl_div(ours, theirs, log_target=True, reduction="batchmean").item()


@torch.no_grad()
def largest_difference(teacher, student):
    return (logits(teacher, HELD_OUT) - logits(student, HELD_OUT)).abs().max().item()


@torch.no_grad()
def accuracy(model):
    right = HELD_OUT["labels"][HELD_OUT["labels"] != -100]
    return (logits(model, HELD_OUT).argmax(-1) == right).float().mean().item()


def test_nothing_shrunk_is_the_teacher_bit_for_bit(teacher):
    student, kept = initial_student(teacher, SAME, PAIRS)
    assert largest_difference(teacher, student) == 0
    assert kept.channels == tuple(range(48))
    assert kept.encoder_layers == (0, 1)


def test_silent_neurons_are_left_out_without_a_trace(teacher):
    quiet = pico_model()
    quiet.load_state_dict(teacher.state_dict())
    silent = torch.arange(96) % 3 == 0  # a third, so that the first 64 are not the right ones
    with torch.no_grad():
        for name, module in quiet.named_modules():
            if name.endswith("fc1"):
                module.weight[silent] = 0
                module.bias[silent] = -1
    shape = SAME.model_copy(update={"ffn_dim": 64})
    student, kept = initial_student(quiet, shape, PAIRS)
    activity = measure_activity(quiet, PAIRS)
    for name, neurons in kept.neurons.items():
        dropped = [neuron for neuron in range(96) if neuron not in neurons]
        assert activity.neurons[name][dropped].max() == 0
        assert activity.neurons[name][silent].max() == 0
    assert largest_difference(quiet, student) < 1e-4
    assert largest_difference(quiet, initial_student(quiet, shape, how="truncated")[0]) > 0.1


def test_layers_that_do_nothing_are_left_out_without_a_trace():
    large = pico_model(encoder_layers=3, decoder_layers=3, init_std=0.2)
    with torch.no_grad():
        for stack in (large.model.encoder, large.model.decoder):
            for name, module in stack.layers[0].named_modules():
                if name.endswith(("out_proj", "fc2")):
                    module.weight.zero_()
                    module.bias.zero_()
    student, kept = initial_student(large, SAME, PAIRS)
    assert (kept.encoder_layers, kept.decoder_layers) == ((1, 2), (1, 2))
    assert largest_difference(large, student) < 1e-4
    assert largest_difference(large, initial_student(large, SAME, how="truncated")[0]) > 0.1


def test_a_norm_over_fewer_channels_becomes_the_wide_one_when_the_others_are_silent():
    states = 100 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states -= states.mean(dim=1, keepdim=True)
    wide, narrow = nn.LayerNorm(6, dtype=torch.float64), nn.LayerNorm(4, dtype=torch.float64)
    with torch.no_grad():
        wide.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0]))
        wide.bias.copy_(torch.arange(6.0))
        wanted = wide(pad(states, (0, 2)))[:, :4]
        _fit_norm(narrow, [(states[:50], wanted[:50]), (states[50:], wanted[50:])])
        torch.testing.assert_close(narrow(states), wanted, atol=1e-4, rtol=0)
    # four channels vary as much as six of which two are silent, times 6 / 4
    torch.testing.assert_close(narrow.weight, wide.weight[:4] * (6 / 4) ** 0.5, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1},
        {"ffn_dim": 32},
        {"d_model": 32, "attention_heads": 2},
        {"d_model": 32, "attention_heads": 2, "layers": 1},
    ],
    ids=["depth", "neurons", "width", "width and depth"],
)
def test_shrunk_is_nearer_to_the_teacher_than_truncated_and_random(teacher, changes):
    shape = SAME.model_copy(update=changes)
    shrunk = divergence(teacher, initial_student(teacher, shape, PAIRS)[0])
    truncated, random = (
        divergence(teacher, initial_student(teacher, shape, how=how)[0]) for how in ("truncated", "random")
    )
    assert shrunk < 0.7 * truncated
    assert shrunk < 0.5 * random


def test_a_shrunk_student_translates_before_it_is_trained(teacher):
    assert accuracy(teacher) > 0.7
    narrow = SAME.model_copy(update={"d_model": 32, "attention_heads": 2})
    assert accuracy(initial_student(teacher, narrow, PAIRS)[0]) > 0.8 * accuracy(teacher)
    assert accuracy(initial_student(teacher, narrow, how="truncated")[0]) < 0.4


def test_the_saved_folder_loads_with_stock_transformers(teacher, tmp_path):
    student, _ = initial_student(teacher, SMALL, PAIRS)
    student.save_pretrained(tmp_path)
    loaded, info = M2M100ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert largest_difference(student, loaded.eval()) == 0
    assert loaded.lm_head.weight is loaded.model.shared.weight
    config = loaded.config
    assert (config.d_model, config.encoder_layers, config.decoder_layers, config.num_hidden_layers) == (32, 1, 1, 1)
    assert (config.encoder_attention_heads, config.decoder_ffn_dim, config.encoder_layerdrop) == (2, 48, 0)
    written = loaded.generate(input_ids=HELD_OUT["input_ids"][:2], max_new_tokens=4, do_sample=False)
    assert written.shape[0] == 2


def test_the_teacher_is_left_as_it_was():
    teacher = pico_model().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, _ = initial_student(teacher, SMALL, PAIRS[:1])
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.training
    assert not student.training
    assert all(not module._forward_pre_hooks for module in teacher.modules())


def test_padding_and_the_cut_into_batches_do_not_matter(teacher):
    rows = batch(12, seed=3)
    padded = {
        "input_ids": pad(rows["input_ids"], (0, 3), value=PAD),
        "attention_mask": pad(rows["attention_mask"], (0, 3)),
        "decoder_input_ids": pad(rows["decoder_input_ids"], (0, 4), value=PAD),
        "labels": pad(rows["labels"], (0, 4), value=-100),
    }
    halves = [{name: value[half] for name, value in padded.items()} for half in (slice(0, 5), slice(5, 12))]
    one, two = measure_activity(teacher, [rows]), measure_activity(teacher, halves)
    torch.testing.assert_close(one.channels_D, two.channels_D, rtol=1e-5, atol=1e-7)
    for name, values in one.neurons.items():
        torch.testing.assert_close(values, two.neurons[name], rtol=1e-4, atol=1e-4)
    first, second = (initial_student(teacher, SMALL, pairs)[0] for pairs in ([rows], halves))
    assert largest_difference(first, second) < 0.02


def test_targets_without_labels_are_told_by_the_padding_token(teacher):
    plain = [{name: value for name, value in rows.items() if name != "labels"} for rows in PAIRS[:2]]
    with_labels = [
        {**rows, "labels": rows["decoder_input_ids"].masked_fill(rows["decoder_input_ids"] == PAD, -100)}
        for rows in plain
    ]
    one, two = (initial_student(teacher, SMALL, pairs)[0] for pairs in (plain, with_labels))
    assert largest_difference(one, two) == 0
    assert END not in (PAD, -100)  # the first input of the decoder is the end token, and real


def test_layers_are_kept_evenly_with_the_last():
    assert _evenly(12, 6) == (1, 3, 5, 7, 9, 11)
    assert _evenly(12, 4) == (2, 5, 8, 11)
    assert _evenly(3, 2) == (1, 2)
    assert _evenly(5, 1) == (4,)
    assert _evenly(4, 4) == (0, 1, 2, 3)


def test_the_most_active_parts_are_kept(teacher):
    activity = measure_activity(teacher, PAIRS[:2])
    kept = choose(teacher, SMALL, activity)
    for name, neurons in kept.neurons.items():
        others = [neuron for neuron in range(96) if neuron not in neurons]
        assert activity.neurons[name][list(neurons)].min() >= activity.neurons[name][others].max()
    others = [channel for channel in range(48) if channel not in kept.channels]
    assert activity.channels_D[list(kept.channels)].min() >= activity.channels_D[others].max()
    assert list(kept.channels) == sorted(kept.channels)
    assert {len(heads) for heads in kept.heads.values()} == {2}
    assert len(kept.heads) == 2 + 2 * 2  # self-attention of both sides and cross-attention
    json.dumps(kept.to_json())


def test_random_students_follow_their_seed_and_leave_the_generator_alone(teacher):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, three = (initial_student(teacher, SMALL, how="random", seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert largest_difference(one, two) == 0
    assert largest_difference(one, three) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 40}, "set attention_heads to d_model / 16"),
        ({"d_model": 64, "attention_heads": 4}, "d_model is 64, the teacher has 48"),
        ({"layers": 3}, "layers is 3, the teacher has 2"),
        ({"ffn_dim": 97}, "ffn_dim is 97, the teacher has 96"),
    ],
)
def test_a_student_that_does_not_fit_into_the_teacher_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        initial_student(pico_model(), SAME.model_copy(update=changes), PAIRS)


def test_shrinking_needs_pairs_and_tied_embeddings():
    with pytest.raises(ConfigError, match="needs sentence pairs"):
        initial_student(pico_model(), SAME)
    untied = M2M100ForConditionalGeneration(pico_config(tie_word_embeddings=False))
    with pytest.raises(ConfigError, match="not tied"):
        initial_student(untied, SAME, PAIRS)
