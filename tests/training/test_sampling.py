"""Batches of similar length: every row once, little padding, the same order for the same seed and epoch."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from soju.training.sampling import LengthBuckets, LengthBucketSampler, length_batches, set_epoch_everywhere

LENGTHS = np.array([5, 1, 4, 2, 3, 9, 7, 8, 6, 0])


def padding(batches, lengths):
    return sum(lengths[batch].max() * len(batch) - lengths[batch].sum() for batch in map(np.array, batches))


def test_one_window_over_everything_sorts_by_length():
    batches = length_batches(LENGTHS[:8], 2, seed=0, window=4)
    assert sorted(map(sorted, batches)) == [[0, 6], [1, 3], [2, 4], [5, 7]]


def test_rows_left_over_come_last_because_accelerate_loses_a_short_batch_elsewhere():
    assert [len(batch) for batch in length_batches(LENGTHS, 4, seed=1, window=1)] == [4, 4, 2]


def test_drop_last_leaves_out_the_rows_that_fill_no_batch():
    assert [len(batch) for batch in length_batches(LENGTHS, 4, seed=1, drop_last=True)] == [4, 4]


def test_same_seed_and_epoch_give_the_same_batches_and_another_epoch_gives_others():
    first = length_batches(LENGTHS, 2, seed=3, epoch=1)
    assert first == length_batches(LENGTHS, 2, seed=3, epoch=1)
    assert first != length_batches(LENGTHS, 2, seed=3, epoch=2)
    assert first != length_batches(LENGTHS, 2, seed=4, epoch=1)


def test_batches_of_similar_length_pad_less_than_a_free_shuffle():
    lengths = np.random.default_rng(0).geometric(0.1, 2000)
    bucketed = padding(length_batches(lengths, 16, seed=0, window=50), lengths)
    shuffled = padding(length_batches(lengths, 16, seed=0, window=1), lengths)
    longest = padding([list(range(2000))], lengths)
    assert shuffled > padding(length_batches(lengths, 16, seed=0, window=5), lengths) > bucketed
    assert bucketed < 0.03 * longest


@given(
    rows=st.integers(0, 60),
    batch_size=st.integers(1, 7),
    window=st.integers(1, 5),
    ranks=st.integers(1, 4),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_rank_gets_equally_many_batches_and_no_row_comes_twice(rows, batch_size, window, ranks, drop_last, seed):
    lengths = np.arange(rows) % 7
    sampler = LengthBucketSampler(lengths, batch_size, seed=seed, window=window, ranks=ranks, drop_last=drop_last)
    shards = [
        list(BatchSamplerShard(sampler, num_processes=ranks, process_index=rank, even_batches=False))
        for rank in range(ranks)
    ]
    assert len({len(shard) for shard in shards}) == 1
    assert len(sampler) == sum(map(len, shards)) == len(list(sampler))
    seen = [row for shard in shards for batch in shard for row in batch]
    assert len(seen) == len(set(seen))
    left_out = rows - len(seen)
    assert left_out == (rows % (batch_size * ranks) if drop_last or rows % (batch_size * ranks) < ranks else 0)


def test_two_ranks_with_batch_four_see_the_rows_of_one_rank_with_batch_eight():
    lengths = np.arange(40) % 9
    one = length_batches(lengths, 8, seed=5, window=2)
    two = length_batches(lengths, 4, seed=5, window=2, ranks=2)
    assert [first + second for first, second in zip(two[::2], two[1::2], strict=True)] == one


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"window": 0}, {"ranks": 0}])
def test_sizes_below_one_are_refused(bad):
    with pytest.raises(ValueError, match=">= 1"):
        length_batches(LENGTHS, **{"batch_size": 2, "seed": 0, **bad})


ROWS = [{"text": "가나다", "length": 3}, {"text": "a", "length": 1}, {"text": "ab", "length": 2}]


class Table(list):
    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.mark.parametrize("lengths", ["length", [3, 1, 2], lambda row: len(row["text"])])
def test_lengths_come_from_a_column_a_list_or_a_function_of_the_row(lengths):
    sampler = LengthBuckets(lengths, seed=9)(Table(ROWS), batch_size=1, drop_last=False, seed=0)
    assert sampler.lengths.tolist() == [3, 1, 2]
    assert sampler.seed == 9


def test_a_list_of_lengths_for_other_rows_is_refused():
    with pytest.raises(ValueError, match="4 lengths for 3 rows"):
        LengthBuckets([1, 2, 3, 4])(ROWS, batch_size=1, drop_last=False)


def test_an_epoch_reaches_the_sampler_through_every_wrapper_of_a_resumed_multi_rank_loader():
    sampler = LengthBucketSampler(LENGTHS, 2, seed=0, ranks=2)
    shard = BatchSamplerShard(sampler, num_processes=2, process_index=1, even_batches=False)
    resumed = skip_first_batches(DataLoaderShard(torch.arange(10), batch_sampler=shard), 1)
    resumed.set_epoch(3)
    assert sampler.epoch == 0  # the stock call does not get there: the run would repeat epoch 0
    set_epoch_everywhere(resumed, 3)
    assert sampler.epoch == 3


def test_a_loader_without_batch_sampler_needs_no_epoch():
    set_epoch_everywhere(DataLoader(torch.arange(4), batch_size=None), 3)
