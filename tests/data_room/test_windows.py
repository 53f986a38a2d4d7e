"""The windowed shuffle is a permutation of every epoch, and its reads stay within a few shards."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextblock.data.stream import locate
from nextblock.data.windows import Windows

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, shards=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation_whatever_the_grouping(sizes, shards, seed, epoch) -> None:
    total = sum(sizes)
    whole = Windows(sizes, shards).order(seed, epoch, np.arange(total))
    assert np.array_equal(np.sort(whole), np.arange(total))
    backwards = np.arange(total)[::-1]
    other = Windows(sizes, shards)
    assert np.array_equal(np.concatenate([other.order(seed, epoch, [place]) for place in backwards]), whole[::-1])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30), shards=st.integers(1, 8), seed=st.integers(0, 5))
def test_reads_stay_within_a_window_of_shards(sizes, shards, seed) -> None:
    found = Windows(sizes, shards).order(seed, 3, np.arange(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[found]
    seen, window = set(), []
    for shard in shard_of.tolist():
        if shard not in window:
            window.append(shard)
            assert shard not in seen, "a shard is opened again after its window"
        if len(window) > shards:  # the first shard of the next window: all before are done with
            seen.update(window[:-1])
            window = window[-1:]


def test_seeds_and_epochs_differ_and_samples_of_a_window_are_mixed() -> None:
    windows = Windows([50] * 8, 4)
    orders = [windows.order(seed, epoch, np.arange(400)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    first = orders[0][:200]
    assert len(set((first // 50).tolist())) == 4
    assert len(set((first[:40] // 50).tolist())) == 4, "the first samples come from all shards of the window"
    assert np.array_equal(pickle.loads(pickle.dumps(windows)).order(0, 0, np.arange(400)), orders[0])
    # one window is a whole shuffle
    assert abs(np.corrcoef(np.arange(400), Windows([50] * 8, 8).order(0, 0, np.arange(400)))[0, 1]) < 0.2


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1 shard"):
        Windows([1], 0)
    with pytest.raises(ValueError, match=r"range\(3\)"):
        Windows([1, 2], 1).order(0, 0, [3])
    with pytest.raises(ValueError, match=r"range\(3\)"):
        Windows([1, 2], 1).order(0, 0, [-1])


def test_locate_takes_an_order() -> None:
    windows = Windows([3, 4, 5], 2)
    epochs, indices = locate(0, np.arange(36), 12, windows.order)
    assert epochs.tolist() == np.repeat([0, 1, 2], 12).tolist()
    for epoch in range(3):
        assert np.array_equal(indices[epoch * 12 : epoch * 12 + 12], windows.order(0, epoch, np.arange(12)))
    assert not np.array_equal(indices, locate(0, np.arange(36), 12)[1])
