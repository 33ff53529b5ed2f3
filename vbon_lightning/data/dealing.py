"""Which rows a process sees, in which order: shuffled by seed and epoch, dealt to ranks, resumable at any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from vbon_lightning.sampling import noise_seed


class Rows(Dataset):
    """Rows of a split; an index beyond the end is a row that only evens out the ranks."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """Hash of all rows."""
        return hashlib.sha256(repr([tuple(row) for row in self.rows]).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> tuple[int, bool, Any]:
        return index % len(self.rows), index < len(self.rows), self.rows[index % len(self.rows)]


class ResumableLoader(DataLoader):
    """A loader whose position lives in the module's batch counter, so that it keeps no state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept the empty state; the sampler asks the module where training is."""


class RowDealer(DistributedSampler):
    """Deal rows out to ranks, batch by batch, as a pure function of (seed, epoch, rank).

    It is a ``DistributedSampler``, so Lightning leaves it in place. Three things differ. Rank r of W takes rows r,
    r + W, ... of the shuffled order, so that W ranks with batch B see together what one rank with batch W x B
    sees. Rows that only even out the ranks get indices beyond the data set, so that metrics can leave them out.
    And the position in the stream of batches is asked for rather than remembered: a resumed run goes on with the
    batch that would have come next, wherever in an epoch that was.

    Args:
        size: Rows in the data set.
        batch_size: Rows a batch and rank.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Shuffle anew each epoch.
        seed: Seeds the shuffle.
        drop_last: Leave out the rows that do not fill a batch on every rank; otherwise pad.
        repeats: How often each batch is dealt in a row (updates a rollout); needs ``drop_last``.
        position: Returns how many batches this rank has been dealt since the start of training; from it come the
            epoch and the place in it. Without it every iteration is a whole epoch (``set_epoch``).
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        repeats: int = 1,
        position: Callable[[], int] | None = None,
    ) -> None:
        if repeats > 1 and not drop_last:
            raise ValueError("repeated batches need drop_last=True: a short batch would run into its repeat")
        rows: Any = range(size)  # of the data it asks the length only
        super().__init__(rows, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.size, self.batch_size, self.repeats, self.drop_last = size, batch_size, repeats, drop_last
        self.position = position
        per_rank = -(-size // num_replicas)
        if drop_last:
            per_rank = size // (num_replicas * batch_size) * batch_size
        self.per_rank = per_rank

    @property
    def batches(self) -> int:
        """Return how many batches an epoch deals to this rank, repeats included."""
        return -(-self.per_rank // self.batch_size) * self.repeats

    def __len__(self) -> int:
        return self.per_rank * self.repeats

    def __iter__(self) -> Iterator[int]:
        epoch, start = (self.epoch, 0) if self.position is None else divmod(self.position(), self.batches)
        if self.shuffle:
            generator = torch.Generator().manual_seed(noise_seed(self.seed, "shuffle", epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        total = self.per_rank * self.num_replicas
        order += range(self.size, total)
        mine = order[self.rank : total : self.num_replicas]
        for batch in range(start, self.batches):
            first = batch // self.repeats * self.batch_size
            yield from mine[first : first + self.batch_size]


class BatchTaker(DistributedSampler):
    """Deal batches that no other process has taken, each process its share first.

    A batch is of the same rows whoever deals it and whatever is done already: the last digits of a prompt's numbers
    hang on those that it is padded to. Of W ranks, rank r begins with the batches r, r + W, ... that are wanted; these
    are its length. What cannot be taken is passed over. The last batch is filled up with indices beyond the data set.

    Ranks that hold a model together make the same passes: each is dealt its share alone, also what it cannot take, and
    at the end a batch of indices beyond the data set where others have one more.

    Args:
        wanted: Numbers of the batches to deal.
        take: Takes a batch, of rows with these numbers, and tells whether this process has it now.
        batch_size: Rows a batch.
        num_replicas: Number of ranks.
        rank: This rank.
        together: The ranks hold a model together.
    """

    def __init__(
        self,
        wanted: Sequence[int],
        take: Callable[[range], bool],
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        together: bool = False,
    ) -> None:
        rows: Any = range(len(wanted) * batch_size)
        super().__init__(rows, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.take, self.batch_size, self.together = take, batch_size, together
        if together:
            beyond = [max(wanted) + 1] * (-len(wanted) % num_replicas)
            wanted = [*wanted, *beyond]
        ranks = [(rank + later) % num_replicas for later in range(num_replicas)]
        self.share = wanted[rank::num_replicas]
        self.order = [batch for rank in ranks for batch in wanted[rank::num_replicas]]

    def __len__(self) -> int:
        return len(self.share) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for batch in self.share if self.together else self.order:
            rows = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            if self.take(rows) or self.together:
                yield from rows


class StreamedRows(IterableDataset):
    """Deal rows that are read as they are needed, as :class:`RowDealer` deals those that are all there.

    The rows of an epoch come in the order of the source, shuffled among the ``buffer`` that are read together, which
    is a pure function of the seed and the epoch; rank r of W takes every W-th. The last rows of an epoch, which do
    not fill a batch on every rank, are left out. Where training is, is asked for; the rows before are read and
    passed over.

    Args:
        read: Starts reading the encoded rows from the first.
        batch_size: Rows a batch and rank.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seeds the shuffle.
        buffer: Rows that are shuffled among each other; rounded up to whole batches of all ranks.
        repeats: How often each batch is dealt in a row (updates a rollout).
        position: Returns how many batches this rank has been dealt since the start of training.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Any]],
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        buffer: int = 1000,
        repeats: int = 1,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.read, self.batch_size, self.num_replicas, self.rank = read, batch_size, num_replicas, rank
        self.seed, self.repeats, self.position = seed, repeats, position
        self.together = batch_size * num_replicas
        self.buffer = -(-buffer // self.together) * self.together
        self.batches: int | None = None
        """How many batches an epoch has, repeats included; known once one was read to its end."""

    def __iter__(self) -> Iterator[tuple[int, bool, Any]]:
        epoch, skipped = 0, self.position()
        if self.batches is not None:
            epoch, skipped = divmod(skipped, self.batches)
        while True:
            dealt = 0
            for batch in self._epoch(epoch):
                for _ in range(self.repeats):
                    dealt += 1
                    if dealt > skipped:
                        yield from batch
            self.batches = dealt
            if not dealt:
                raise ValueError(
                    f"the rows of data.train do not fill one batch of {self.batch_size} on {self.num_replicas} rank(s)"
                )
            if skipped < dealt:
                return
            epoch, skipped = epoch + 1, skipped - dealt

    def _epoch(self, epoch: int) -> Iterator[list[tuple[int, bool, Any]]]:
        rows = enumerate(self.read())
        for number in count():
            some = list(islice(rows, self.buffer))
            generator = torch.Generator().manual_seed(noise_seed(self.seed, "shuffle", epoch, number))
            order = torch.randperm(len(some), generator=generator).tolist()
            for first in range(0, len(some) - self.together + 1, self.together):
                mine = order[first + self.rank : first + self.together : self.num_replicas]
                yield [(some[place][0], True, some[place][1]) for place in mine]
            if len(some) < self.buffer:
                return
