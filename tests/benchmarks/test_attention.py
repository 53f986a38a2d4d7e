"""The ways of attention that are compared give the same."""

from __future__ import annotations

import torch

from benchmarks import attention
from close import assert_close


def test_prefixes_are_the_dense_mask() -> None:
    shape = attention.Shape("small", heads=2, head_dim=8, entities=3, size=4)
    q, k, v = shape.tensors(2, "cpu")
    found = [way(q, k, v) for way in (attention.dense(shape, "cpu"), attention.prefixes(shape))]
    assert_close(found[1], found[0], 1e-5)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in found]
    for mine, theirs in zip(*grads, strict=True):
        assert_close(mine, theirs, 1e-5)


def test_it_runs_in_small() -> None:
    made = attention.rows("cpu", quick=True)
    assert [row.name for row in made] == [row.name for row in attention.planned("cpu")]
    assert all(row.ours and row.plain and row.ratio("plain") for row in made)
    assert len(attention.planned("cuda")) == 3
