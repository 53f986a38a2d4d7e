"""Every quick way of sampling gives what the plain way gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from nextblock.xar import passes
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.passes import FastPasses, Passes
from nextblock.xar.sampler import sample_latents

SMALL: dict[str, Any] = {
    "latent_size": (4, 6), "latent_channels": 3, "width": 16, "depth": 3, "num_heads": 2, "num_classes": 5,
    "entity_size": 2,
}  # fmt: skip
ENTITIES: dict[str, dict[str, Any]] = {
    "patches": {"ordering": "patches"},
    "cells": {"ordering": "cells"},
    "scales": {"ordering": "scales"},
    "whole": {"ordering": "whole"},
    "no classes": {"num_classes": 0, "label_dropout": 0.0},
}


def make(name: str = "cells") -> XAR:
    torch.manual_seed(0)
    return XAR(XARConfig(**(SMALL | ENTITIES[name]))).double()


def drawn(model: XAR, made_by: Passes | None = None, **more: Any) -> Tensor:
    classes = model.config.num_classes
    given: dict[str, Any] = {"labels": torch.tensor([1, 4, 0]), "guidance": 2.0} if classes else {"count": 3}
    return sample_latents(model, passes=made_by, **({"steps": 4, "solver": "heun"} | given | more))


def recorded_on_the_host(run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
    """What `passes.cuda_graph` promises, without a graph: `replay` fills the tensor that the first run gave."""
    out = run()

    def replay() -> None:
        found = run()
        if out is not None and found is not None:
            out.copy_(found)

    return replay, out


@pytest.mark.parametrize("name", ENTITIES)
def test_what_class_and_time_make_of_a_layer_is_computed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.layers[0].modulation.register_forward_hook(count)
    monkeypatch.setattr(passes, "KEPT_BYTES", 0)
    plain, without, calls = drawn(model), calls, 0
    monkeypatch.setattr(passes, "KEPT_BYTES", 2**20)
    assert_close(drawn(model), plain, 1e-12)
    entities = model.ordering.num_entities
    assert calls == (without if entities == 1 else 5)  # Heun's times of 4 steps, 0 included: 1, 3/4, 1/2, 1/4, 0


def test_a_finished_entity_needs_the_last_layers_keys_and_values_only() -> None:
    model, seen = make(), []
    model.layers[-1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    model.tokens_out.register_forward_hook(lambda *_: seen.append("out"))
    drawn(model, solver="euler", steps=3)
    assert seen == ["mlp", "out"] * (3 * model.ordering.num_entities)


@pytest.mark.parametrize("name", ENTITIES)
def test_compiled_and_recorded_passes_sample_the_same(name: str) -> None:
    model = make(name)
    plain = drawn(model)
    assert_close(drawn(model, FastPasses(model, backend="eager", record=None)), plain, 1e-12)
    recording = FastPasses(model, backend="eager", record=recorded_on_the_host)
    for _ in range(2):  # the second time, everything is replayed
        assert_close(drawn(model, recording), plain, 1e-12)
    assert_close(drawn(model, recording, seed=7), drawn(model, seed=7), 1e-12)
    if model.config.num_classes:
        few = {"labels": torch.tensor([2]), "guidance": 1.0}
        assert_close(drawn(model, recording, **few), drawn(model, **few), 1e-12)
    assert model.layers[0].before.__func__ is type(model.layers[0]).before  # the model itself is as it was


def test_each_shape_is_recorded_once_and_not_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorded = make(), []

    def record(run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        recorded.append(run)
        return recorded_on_the_host(run)

    fast = FastPasses(model, backend="eager", record=record)
    for _ in range(2):
        drawn(model, fast)
    # six cells: the first unguided, five doubled, and five of the six remembered
    assert len(recorded) == 11
    monkeypatch.setattr(passes, "MOST_RECORDED", 4)
    recorded.clear()
    few = FastPasses(model, backend="eager", record=record)
    assert_close(drawn(model, few), drawn(model), 1e-12)
    assert len(recorded) == 0  # too many shapes: none, rather than some


def test_passes_belong_to_their_model() -> None:
    with pytest.raises(ValueError, match="another model"):
        drawn(make(), Passes(make()))
