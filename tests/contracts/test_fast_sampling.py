"""Every quick way of sampling gives what the plain way gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.training.activation_checkpointing import checkpoint_layers
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


SLOW = pytest.mark.slow  # each of them compiles for ten seconds and more


def make(name: str = "cells") -> XAR:
    torch.manual_seed(0)
    return XAR(XARConfig(**(SMALL | ENTITIES[name]))).double()


def drawn(model: XAR, made_by: Passes | None = None, **more: Any) -> Tensor:
    classes = model.config.num_classes
    given: dict[str, Any] = {"labels": torch.tensor([1, 4, 0]), "guidance": 2.0} if classes else {"count": 3}
    return sample_latents(model, passes=made_by, **({"steps": 4, "solver": "heun"} | given | more))


class HostRecorder:
    """What `passes.CudaGraphs` promises, without graphs: `replay` fills the tensor that the first run gave, and works
    on the cache that there was when it was recorded, wherever that now is."""

    def __init__(self) -> None:
        self.fast: FastPasses
        self.count = 0

    def __call__(self, run: Callable[[], Tensor | None]) -> tuple[Callable[[], None], Tensor | None]:
        self.count += 1
        cache, length, out = self.fast.cache, self.fast.cache.length, run()

        def replay() -> None:
            now, self.fast.cache = self.fast.cache, cache
            before, cache.length = cache.length, length
            found = run()
            self.fast.cache, cache.length = now, before
            if out is not None and found is not None:
                out.copy_(found)

        return replay, out


def recording(model: XAR) -> tuple[FastPasses, HostRecorder]:
    recorder = HostRecorder()
    recorder.fast = FastPasses(model, backend="eager", record=recorder)
    return recorder.fast, recorder


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


@pytest.mark.parametrize("name", [name if name == "cells" else pytest.param(name, marks=SLOW) for name in ENTITIES])
def test_compiled_and_recorded_passes_sample_the_same(name: str) -> None:
    model = make(name)
    plain = drawn(model)
    assert_close(drawn(model, FastPasses(model, backend="eager", record=None)), plain, 1e-12)
    fast, _ = recording(model)
    for _ in range(2):  # the second time, everything is replayed
        assert_close(drawn(model, fast), plain, 1e-12)
    assert_close(drawn(model, fast, seed=7), drawn(model, seed=7), 1e-12)
    if model.config.num_classes:  # room for twice the rows while some passes still have the old number
        sometimes: dict[str, Any] = {"guidance_interval": (0.3, 0.8)}
        grown, _ = recording(model)
        for more in ({"guidance": 1.0}, sometimes):
            assert_close(drawn(model, grown, **more), drawn(model, **more), 1e-12)
    for labels in (
        [3, 2, 2],
        [2],
        [0, 1, 2, 3, 4],
        [1, 4, 0],
    ):  # others, fewer, more than there was room for, the first
        given = {"labels": torch.tensor(labels)} if model.config.num_classes else {"count": len(labels)}
        assert_close(drawn(model, fast, **given), drawn(model, **given), 1e-12)
    assert model.layers[0].before.__func__ is type(model.layers[0]).before  # the model itself is as it was


def test_each_shape_is_recorded_once_and_not_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    fast, recorder = recording(model)
    for _ in range(2):
        drawn(model, fast)
    # six cells: the first unguided, five doubled, and five of the six remembered
    assert recorder.count == 11
    monkeypatch.setattr(passes, "MOST_RECORDED", 20)
    fewer = {"labels": torch.tensor([2, 1])}
    assert_close(drawn(model, fast, **fewer), drawn(model, **fewer), 1e-12)  # eleven more do not fit beside
    assert_close(drawn(model, fast), drawn(model), 1e-12)
    assert len(fast._recorded) <= 20
    monkeypatch.setattr(passes, "MOST_RECORDED", 4)
    none, recorder = recording(model)
    assert_close(drawn(model, none), drawn(model), 1e-12)
    assert recorder.count == 0  # too many shapes: none, rather than some


def test_passes_are_of_one_precision_whatever_surrounds_them() -> None:
    model = make().float()
    fast, plain = FastPasses(model, backend="eager", record=None), drawn(model)
    for bf16 in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert_close(drawn(model, fast), plain, 1e-5)
    coarse = FastPasses(model, bf16=True, backend="eager", record=None)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = drawn(model)
    assert_close(drawn(model, coarse), autocast, 3e-2)


def test_weights_that_change_are_noticed_and_no_numbers_are_drawn() -> None:
    model = make()
    torch.manual_seed(3)
    fast = FastPasses(model, backend="eager", record=None)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.tokens_out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="have changed"):
        drawn(model, fast)
    checkpoint_layers(model, "full")
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        FastPasses(model)


def test_passes_belong_to_their_model() -> None:
    with pytest.raises(ValueError, match="another model"):
        drawn(make(), Passes(make()))
