"""Batches of texts of similar length, and their collation: pure functions of seed, epoch and rows."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from sentence_transformers.base.sampler import DefaultBatchSampler

from soju.training.state import seeded

if TYPE_CHECKING:
    from datasets import Dataset


Lengths = Sequence[int] | str | Callable[[Mapping[str, Any]], int]
"""One number a row, the name of a column that holds it, or a function of a row."""


def length_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    window: int = 50,
    ranks: int = 1,
    drop_last: bool = False,
) -> list[list[int]]:
    """Cut all rows into batches of similar length.

    Rows are shuffled and cut into windows; inside a window they are sorted by length and cut into groups of
    ``ranks * batch_size`` rows; groups are shuffled. A group is one batch for each rank, so that ranks wait little for
    each other, and 2 ranks with batch 4 see the rows of 1 rank with batch 8. Rows left over come last, because
    accelerate loses a short batch anywhere else, dealt evenly to the ranks.

    Args:
        lengths: Length of each row in any unit, ``(rows,)``.
        batch_size: Rows of a batch on one rank, >= 1.
        seed: Decides the order together with `epoch`.
        epoch: Pass over the data, >= 0.
        window: Groups in a window, >= 1: 1 shuffles freely, more pads less.
        ranks: Processes that share the batches; their number is a multiple of this.
        drop_last: Leave out the rows that fill no group. Fewer rows than `ranks` are left out in any case.

    Returns:
        Batches of row indices. Consecutive batches go to ranks 0, 1, ...

    Raises:
        ValueError: If `batch_size`, `window` or `ranks` is below 1.
    """
    if batch_size < 1 or window < 1 or ranks < 1:
        raise ValueError(f"batch_size, window and ranks must be >= 1, got {batch_size}, {window}, {ranks}")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    group = batch_size * ranks
    full = len(order) // group * group
    groups: list[NDArray[np.int64]] = []
    for start in range(0, full, group * window):
        rows = order[start : min(start + group * window, full)]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        groups.extend(rows.reshape(-1, group))
    batches = [batch for index in generator.permutation(len(groups)) for batch in groups[index].reshape(ranks, -1)]
    rest = order[full:]
    if len(rest) >= ranks and not drop_last:
        batches.extend(np.array_split(rest, ranks))
    return [batch.tolist() for batch in batches]


class LengthBucketSampler(DefaultBatchSampler):
    """`length_batches` in the shape sentence-transformers takes. See `LengthBuckets` for the training arguments.

    A resume needs nothing from it: the trainer sets the epoch and skips the batches it has had.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        batch_size: int,
        *,
        seed: int,
        window: int = 50,
        ranks: int = 1,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        super().__init__(
            range(len(self.lengths)),
            batch_size=batch_size,
            drop_last=drop_last,
            valid_label_columns=valid_label_columns,
            seed=seed,
        )
        self.window = window
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        yield from length_batches(
            self.lengths,
            self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            window=self.window,
            ranks=self.ranks,
            drop_last=self.drop_last,
        )

    def __len__(self) -> int:
        groups, rest = divmod(len(self.lengths), self.batch_size * self.ranks)
        return self.ranks * (groups + (rest >= self.ranks and not self.drop_last))


class LengthBuckets:
    """What to give ``SparseEncoderTrainingArguments(batch_sampler=...)``: makes a `LengthBucketSampler`.

    >>> buckets = LengthBuckets(lambda row: len(row["text"]), window=2)
    >>> sampler = buckets([{"text": "가나"}, {"text": "a"}], batch_size=1, drop_last=False)
    >>> sorted(sampler)
    [[0], [1]]
    """

    def __init__(self, lengths: Lengths, *, window: int = 50, seed: int | None = None) -> None:
        self.lengths = lengths
        self.window = window
        self.seed = seed
        """Overrides the seed of the training arguments: another order of the data, nothing else changed."""

    def __call__(
        self,
        dataset: Dataset | Sequence[Mapping[str, Any]],
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> LengthBucketSampler:
        """Make the sampler of one dataset; sentence-transformers calls this.

        Args:
            dataset: The rows.
            batch_size: Rows of a batch on one rank.
            drop_last: Leave out the rows that fill no batch.
            valid_label_columns: Handed on.
            generator: Not used: the order depends on seed and epoch alone.
            seed: Used unless one was given to the constructor.

        Returns:
            The sampler, for the number of ranks of this process group.

        Raises:
            ValueError: If lengths were given as a sequence and are not one a row.
        """
        lengths = self._of(dataset)
        if len(lengths) != len(dataset):
            raise ValueError(f"{len(lengths):,} lengths for {len(dataset):,} rows; give one length a row")
        return LengthBucketSampler(
            lengths,
            batch_size,
            seed=seed if self.seed is None else self.seed,
            window=self.window,
            ranks=PartialState().num_processes,
            drop_last=drop_last,
            valid_label_columns=valid_label_columns,
        )

    def _of(self, dataset: Any) -> Sequence[int]:
        if isinstance(self.lengths, str):
            return [int(value) for value in dataset[self.lengths]]
        if callable(self.lengths):
            return [self.lengths(row) for row in dataset]
        return self.lengths

    def __repr__(self) -> str:
        return f"LengthBuckets(window={self.window}, seed={self.seed})"


def set_epoch_everywhere(loader: Any, epoch: int) -> None:
    """Tell every sampler below a data loader which epoch begins.

    accelerate and transformers reach one wrapper deep; a resume in the middle of an epoch on several ranks wraps twice,
    and the run would repeat epoch 0.
    """
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None)


class SeededCollator:
    """A collator whose randomness (masked tokens, dropped words) does not depend on what was collated before.

    The data loader collates ahead of training, so a collator that draws from the global generators cannot be resumed:
    at a checkpoint they have moved past batches that the resumed run collates again.
    """

    def __init__(self, collate: Callable[[Any], Any], *, seed: int) -> None:
        self.collate = collate
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # seen by workers that live over epochs

    def set_epoch(self, epoch: int) -> None:
        """Tell which pass over the data begins."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Any) -> Any:
        """Collate rows; the global generators stay where they are."""
        content = json.dumps([self.seed, int(self._epoch), rows], default=_content).encode("utf-8", "surrogatepass")
        with seeded(int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")):
            return self.collate(rows)


def start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Leave Ctrl-C to the main process, which needs its workers until it has saved, then start as before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if start is not None:
        start(worker)


def _content(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.tolist() if hasattr(value, "tolist") else type(value).__qualname__
