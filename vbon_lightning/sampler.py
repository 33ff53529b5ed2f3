"""Which rows a process sees, in which order: shuffled by seed and epoch, sharded by rank, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from vbon_lightning.sampling import noise_seed


class ShardedSampler(DistributedSampler):
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
