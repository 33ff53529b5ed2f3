"""Which rank sees which row, when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from torch.utils.data import DistributedSampler

from vbon_lightning.data.dealing import BatchTaker, RowDealer, StreamedRows


def batches(sampler: RowDealer) -> list[list[int]]:
    rows = list(sampler)
    return [rows[start : start + sampler.batch_size] for start in range(0, len(rows), sampler.batch_size)]


def ranks(size: int, world: int, batch_size: int, **settings: object) -> list[RowDealer]:
    return [RowDealer(size, batch_size=batch_size, num_replicas=world, rank=rank, **settings) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [24, 29])
def test_ranks_together_see_what_one_rank_would(world, drop_last, size):
    settings: dict = {"shuffle": True, "seed": 3, "drop_last": drop_last}
    one = batches(RowDealer(size, batch_size=2 * world, **settings))
    many = [batches(sampler) for sampler in ranks(size, world, 2, **settings)]
    assert len({len(dealt) for dealt in many}) == 1
    assert len(many[0]) == len(one)
    for step, whole in enumerate(one):
        for rank in range(world):
            mine = [row for row in many[rank][step] if row < size]
            assert mine == whole[rank::world]
    seen = sorted(row for dealt in many for batch in dealt for row in batch if row < size)
    assert len(seen) == len(set(seen))
    assert len(seen) == (size // (2 * world) * 2 * world if drop_last else size)


@pytest.mark.parametrize(("size", "world"), [(10, 4), (3, 4), (8, 4), (1, 2)])
def test_padding_rows_lie_beyond_the_data(size, world):
    rows = [list(sampler) for sampler in ranks(size, world, 2)]
    assert len({len(mine) for mine in rows}) == 1
    everything = sorted(row for mine in rows for row in mine)
    assert everything == list(range(-(-size // world) * world))
    assert [len(sampler) for sampler in ranks(size, world, 2)] == [len(mine) for mine in rows]


def test_without_shuffle_rows_come_in_order():
    assert list(RowDealer(5, batch_size=2)) == [0, 1, 2, 3, 4]


def test_shuffle_differs_by_epoch_and_seed_only():
    def order(epoch: int, seed: int) -> list[int]:
        sampler = RowDealer(30, batch_size=5, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(epoch, seed) for seed in (0, 1, 2**62, -1) for epoch in (0, 1, 2)]
    assert all(sorted(rows) == list(range(30)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == len(orders)
    assert order(1, 1) == order(1, 1)
    assert order(0, 0) != list(range(30))


@pytest.mark.parametrize("repeats", [1, 3])
def test_resumes_at_every_batch(repeats):
    settings: dict = {"shuffle": True, "seed": 4, "drop_last": True, "repeats": repeats}
    for rank in range(2):
        place = {"rank": rank, "num_replicas": 2, "batch_size": 3}
        stream: list[list[int]] = []
        for epoch in range(3):
            sampler = RowDealer(20, **place, **settings)
            sampler.set_epoch(epoch)
            stream += batches(sampler)
        per_epoch = 3 * repeats
        assert len(stream) == 3 * per_epoch
        for position in range(2 * per_epoch):
            now = [position]
            sampler = RowDealer(20, **place, **settings, position=lambda now=now: now[0])
            sampler.set_epoch(77)  # the position says more than the epoch
            rest = batches(sampler)
            assert rest == stream[position : (position // per_epoch + 1) * per_epoch]
            now[0] += len(rest)
            assert batches(sampler) == stream[now[0] : now[0] + per_epoch]


def test_the_position_is_asked_for_when_dealing_starts():
    now = [0]
    sampler = RowDealer(8, batch_size=2, position=lambda: now[0])
    rows = iter(sampler)
    now[0] = 3
    assert list(islice(rows, 2)) == [6, 7]


def test_repeats_deal_a_batch_several_times_in_a_row():
    plain = batches(RowDealer(13, batch_size=4, drop_last=True, shuffle=True))
    sampler = RowDealer(13, batch_size=4, drop_last=True, shuffle=True, repeats=3)
    assert batches(sampler) == [batch for batch in plain for _ in range(3)]
    assert len(sampler) == 36
    assert sampler.batches == 9


def test_repeats_need_whole_batches():
    with pytest.raises(ValueError, match="repeated batches need drop_last=True"):
        RowDealer(13, batch_size=4, repeats=2)


def test_drop_last_leaves_out_what_does_not_fill_a_batch_on_every_rank():
    for sampler in ranks(23, 2, 4, drop_last=True):
        assert len(sampler) == 8
        assert len(list(sampler)) == 8
        assert sampler.batches == 2
    for sampler in ranks(23, 2, 4):
        assert len(sampler) == 12
        assert sampler.batches == 3


def test_lightning_leaves_it_in_place():
    # Lightning replaces every sampler that is not one of these under several processes.
    assert isinstance(RowDealer(4, batch_size=2), DistributedSampler)


# -- rows that are read as they are needed ---------------------------------------------------------


def streamed(size: int = 23, **settings: Any) -> StreamedRows:
    return StreamedRows(lambda: iter(range(100, 100 + size)), **({"batch_size": 2, "buffer": 8} | settings))


def dealt(rows: StreamedRows) -> list[list[int]]:
    found = [row for _, _, row in rows]
    return [found[start : start + rows.batch_size] for start in range(0, len(found), rows.batch_size)]


def at(rows: StreamedRows, position: int) -> StreamedRows:
    rows.position = lambda: position
    return rows


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_a_stream_together_see_what_one_rank_would(world: int) -> None:
    one = dealt(streamed(batch_size=2 * world, buffer=6 * world))
    many = [dealt(streamed(num_replicas=world, rank=rank, buffer=6 * world)) for rank in range(world)]
    for step, whole in enumerate(one):
        assert [many[rank][step] for rank in range(world)] == [whole[rank::world] for rank in range(world)]
    assert {len(mine) for mine in many} == {len(one)}
    seen = [row for batch in one for row in batch]
    assert len(set(seen)) == len(seen) == 23 // (2 * world) * 2 * world
    assert [(index, valid) for index, valid, _ in streamed()] == [(row - 100, True) for _, _, row in streamed()]


def test_a_stream_is_shuffled_within_its_buffer_by_seed_and_epoch() -> None:
    batches = dealt(streamed(24))
    blocks = [[row for batch in batches[start : start + 4] for row in batch] for start in (0, 4, 8)]
    assert [sorted(block) for block in blocks] == [list(range(start, start + 8)) for start in (100, 108, 116)]
    assert all(block != sorted(block) for block in blocks)
    assert [row - 8 for row in blocks[1]] != blocks[0]
    assert dealt(streamed(24)) == batches
    assert dealt(streamed(24, seed=1)) != batches
    assert dealt(at(streamed(24), 12)) != batches
    assert dealt(streamed(24, buffer=7)) == batches  # in whole batches of all ranks
    assert dealt(streamed(24, buffer=24)) != batches


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_stream_resumes_at_every_batch(repeats: int) -> None:
    whole = streamed(repeats=repeats)
    epochs = []
    for epoch in range(3):
        epochs += dealt(at(whole, epoch * 11 * repeats))
    assert whole.batches == 11 * repeats
    assert len(epochs) == 3 * 11 * repeats
    if repeats == 3:
        assert epochs[0] == epochs[1] == epochs[2] != epochs[3]
    for position in range(2 * 11 * repeats):
        rest = dealt(at(streamed(repeats=repeats), position))
        ends = (position // (11 * repeats) + 1) * 11 * repeats
        assert rest == epochs[position:ends]


def test_a_stream_reads_no_further_than_it_must() -> None:
    read: list[int] = []

    def rows() -> Iterator[int]:
        for row in range(1000):
            read.append(row)
            yield row

    next(iter(StreamedRows(rows, batch_size=2, buffer=8)))
    assert len(read) == 8


def test_a_stream_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train do not fill one batch of 2 on 12 rank"):
        dealt(streamed(num_replicas=12))


def test_batches_are_taken_whole_each_rank_its_share_first() -> None:
    free = {0, 2, 3, 5}

    def take(rows: range) -> bool:
        batch = rows.start // 4
        found = batch in free
        free.discard(batch)
        return found

    ranks = [BatchTaker([0, 1, 2, 3, 5], take, batch_size=4, num_replicas=2, rank=rank) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [12, 8]
    assert all(isinstance(rank, DistributedSampler) for rank in ranks), "Lightning leaves it in place"
    first, second = (iter(rank) for rank in ranks)
    assert list(islice(first, 4)) == [*range(4)]
    assert list(second) == [*range(12, 16), *range(8, 12), *range(20, 24)], "1 is another's; then the first's share"
    assert list(first) == []


def test_ranks_that_hold_a_model_together_get_as_many_batches_and_no_others_share() -> None:
    asked: list[list[range]] = [[], []]

    def dealt_to(rank: int) -> list[int]:
        taker = BatchTaker(
            range(3),
            lambda rows: bool(asked[rank].append(rows)),
            batch_size=4,
            num_replicas=2,
            rank=rank,
            together=True,
        )
        assert len(taker) == 8
        return list(taker)

    assert dealt_to(0) == [*range(4), *range(8, 12)], "also what it could not take"
    assert dealt_to(1) == [*range(4, 8), *range(12, 16)], "at the end rows beyond the data"
    assert asked == [[range(4), range(8, 12)], [range(4, 8), range(12, 16)]]
