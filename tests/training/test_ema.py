from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from close import assert_close
from nextblock.errors import CheckpointError, ConfigError
from nextblock.training import ema as ema_module
from nextblock.training.ema import EMA

YES, NO = torch.tensor(True), torch.tensor(False)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def step(module: nn.Module) -> None:
    """Other weights, other running statistics."""
    module.train()(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("chunk", [1, 2**26])
def test_it_follows_its_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "CHUNK_NUMBERS", chunk)
    module = small()
    average, wanted = EMA(module, decay=0.3), copied(module)
    for n in range(12):
        step(module)
        average.update(YES)
        decay = min(0.3, (1 + n) / (10 + n))
        now = copied(module)
        for name, value in wanted.items():
            wanted[name] = decay * value + (1 - decay) * now[name] if value.is_floating_point() else now[name]
    assert int(average.count) == 12
    assert int(average.averages["1.num_batches_tracked"]) == 12
    assert "1.running_mean" in wanted
    for name, value in wanted.items():
        assert_close(average.averages[name], value, 1e-6)


def test_without_warm_up_the_decay_is_the_same_from_the_start() -> None:
    module = small()
    average, before = EMA(module, decay=0.75, warmup=False), copied(module)
    step(module)
    average.update(YES)
    assert_close(average.averages["0.weight"], 0.75 * before["0.weight"] + 0.25 * module.state_dict()["0.weight"], 1e-6)


def test_a_skipped_step_leaves_it_alone_even_where_a_buffer_is_not_finite() -> None:
    module = small()
    average = EMA(module, decay=0.9)
    step(module)
    average.update(YES)
    before = {name: value.clone() for name, value in average.averages.items()}
    module[1].running_mean.fill_(float("nan"))  # type: ignore[union-attr, operator]
    module[1].num_batches_tracked += 1  # type: ignore[operator]
    average.update(NO)
    assert all(torch.equal(average.averages[name], value) for name, value in before.items())
    assert int(average.count) == 1


def test_swapped_puts_the_averages_in_and_the_weights_back() -> None:
    module = small()
    average = EMA(module, decay=0.9)
    step(module)
    average.update(YES)
    own, objects = copied(module), list(module.parameters())
    with pytest.raises(KeyError), average.swapped():
        inside = copied(module)
        assert all(torch.equal(inside[name], value) for name, value in average.averages.items())
        assert not torch.equal(inside["0.weight"], own["0.weight"])
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    assert all(a is b for a, b in zip(objects, module.parameters(), strict=True))


def test_a_loaded_average_goes_on_as_if_it_had_not_stopped() -> None:
    module = small()
    whole = EMA(module, decay=0.99)
    for _ in range(3):
        step(module)
        whole.update(YES)
    again = EMA(small(), decay=0.99)
    again.load({"averages": {k: v.clone() for k, v in whole.averages.items()}, "count": whole.count.clone()})
    again.module = module
    step(module)
    for average in (whole, again):
        average.update(YES)
    assert all(torch.equal(again.averages[name], value) for name, value in whole.averages.items())


def test_half_precision_weights_are_averaged_in_float32() -> None:
    module = nn.Linear(2, 2).bfloat16()
    average = EMA(module, decay=0.9999, warmup=False)
    start = average.averages["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    for _ in range(10):
        average.update(YES)
    assert_close(average.averages["weight"] - start, torch.full((2, 2), 1 - 0.9999**10), 0.05)
    with average.swapped():
        assert module.weight.dtype == torch.bfloat16


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"below 1; got 1\.0"):
        EMA(small(), decay=1.0)
    with pytest.raises(CheckpointError, match=r"differs in 2: weight, bias"):
        EMA(nn.Linear(2, 2), 0.9).load(EMA(nn.Linear(3, 3), 0.9).state())
