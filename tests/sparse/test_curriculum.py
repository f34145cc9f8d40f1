"""Stages, schedules and mixes are pure functions of the step."""

import math

import numpy as np
import pytest

from soju.sparse.curriculum import (
    CurriculumSampler,
    Grouping,
    Stage,
    mixed_rows,
    shares_of,
    stage_at,
    stage_ends,
    staged_cosine,
)

V23 = [Stage(0.35), Stage(0.35, 0.5), Stage(0.3, 0.25)]
TYPES = Grouping(("cross", "mono", "single"), np.array([0] * 60 + [1] * 30 + [2] * 10))
HARDNESS = Grouping(("easy", "hard"), np.array([0, 1] * 50))


def test_stages_of_the_published_curriculum_end_after_epochs_7_14_and_20():
    assert stage_ends(V23, 20) == [7, 14, 20]
    assert [stage_at(V23, epoch, 20) for epoch in range(20)] == [0] * 7 + [1] * 7 + [2] * 6


def test_thirds_fill_thirty_epochs_with_ten_each():
    thirds = [Stage(1 / 3), Stage(1 / 3), Stage(1 / 3)]
    assert stage_ends(thirds, 30) == [10, 20, 30]


def test_steps_after_the_last_belong_to_the_last_stage():
    assert stage_at(V23, 99, 20) == 2


def test_the_learning_rate_rises_then_falls_along_a_cosine_times_the_factor_of_the_stage():
    factors = [staged_cosine(step, 100, warm_up_steps=10, stages=V23) for step in range(101)]
    assert factors[0] == 0
    assert factors[5] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(1.0)
    assert factors[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)) / 2)
    assert factors[85] == pytest.approx(0.25 * (1 + math.cos(math.pi * 75 / 90)) / 2)
    assert factors[100] == pytest.approx(0.0)


def test_groups_that_are_not_named_divide_the_rest_evenly():
    assert shares_of({"single": 0.5}, TYPES.names, TYPES.groups_R).tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert shares_of({}, TYPES.names, TYPES.groups_R).tolist() == pytest.approx([1 / 3] * 3)


def test_a_group_without_rows_gets_nothing_of_the_rest():
    groups = np.array([0, 0, 2])
    assert shares_of({"single": 0.5}, TYPES.names, groups).tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_a_mix_has_its_shares_and_repeats_a_short_group_only_as_often_as_it_must():
    rows = mixed_rows(TYPES.groups_R, np.array([0.25, 0.25, 0.5]), 100, seed=(1, 0, 0))
    counts = np.bincount(TYPES.groups_R[rows])
    assert counts.tolist() == [25, 25, 50]
    single, times = np.unique(rows[TYPES.groups_R[rows] == 2], return_counts=True)
    assert len(single) == 10
    assert set(times) == {5}
    assert len(set(rows[TYPES.groups_R[rows] == 0])) == 25


def test_the_share_of_an_empty_group_goes_to_the_others():
    rows = mixed_rows(np.array([0, 1, 1]), np.array([0.25, 0.25, 0.5]), 8, seed=(1,))
    assert np.bincount(np.array([0, 1, 1])[rows]).tolist() == [4, 4]


def sampler(stages, *, epoch=0, ranks=1, accumulation=1, steps=30, batch=10, seed=3):
    made = CurriculumSampler(
        list(range(5, 105)), batch, seed=seed, stages=stages, groupings=(TYPES, HARDNESS), total_steps=steps,
        batches_a_step=accumulation, ranks=ranks,
    )  # fmt: skip
    made.set_epoch(epoch)
    return made


def test_without_a_mix_every_row_comes_once_an_epoch():
    batches = list(sampler([Stage(1.0)]))
    assert sorted(row for batch in batches for row in batch) == list(range(100))
    assert len(batches) == 10


def test_batches_hold_rows_of_similar_length():
    spreads = [max(batch) - min(batch) for batch in sampler([Stage(1.0)])]
    assert max(spreads) == 9  # lengths ascend with the row


def test_an_epoch_is_a_pure_function_of_seed_and_epoch():
    stages = [Stage(0.5, mix={"single": 0.5}), Stage(0.5, mix={"hard": 0.5})]
    assert list(sampler(stages, epoch=1)) == list(sampler(stages, epoch=1))
    assert list(sampler(stages, epoch=1)) != list(sampler(stages, epoch=0))
    assert list(sampler(stages, epoch=1)) != list(sampler(stages, epoch=1, seed=4))


def test_the_mix_changes_in_the_middle_of_an_epoch_where_a_stage_does():
    stages = [Stage(0.5, mix={"single": 1.0, "mono": 0.0, "cross": 0.0}), Stage(0.5, mix={"hard": 1.0, "easy": 0.0})]
    batches = list(sampler(stages, steps=10))
    assert all(TYPES.groups_R[row] == 2 for batch in batches[:5] for row in batch)
    assert all(HARDNESS.groups_R[row] == 1 for batch in batches[5:] for row in batch)


def test_accumulation_counts_steps_not_batches():
    stages = [Stage(0.5, mix={"single": 1.0, "mono": 0.0, "cross": 0.0}), Stage(0.5)]
    batches = list(sampler(stages, steps=5, accumulation=2))  # steps 0, 1, 2 of 5: six batches
    kinds = [bool((TYPES.groups_R[batch] == 2).all()) for batch in batches]
    assert kinds == [True] * 6 + [False] * 4


def test_two_ranks_see_the_rows_of_one_with_twice_the_batch():
    stages = [Stage(0.5, mix={"single": 0.5}), Stage(0.5, mix={"hard": 0.5})]
    one = list(sampler(stages, batch=10, steps=10))
    two = list(sampler(stages, batch=5, ranks=2, steps=10))
    assert [sorted(a + b) for a, b in zip(two[::2], two[1::2], strict=True)] == [sorted(batch) for batch in one]


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="do not fill one batch"):
        CurriculumSampler([1, 2], 4, seed=0, stages=[Stage(1.0)], groupings=(), total_steps=1)
