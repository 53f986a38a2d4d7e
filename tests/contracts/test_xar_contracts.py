"""What must never break in an xAR model, for every entity of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.layers.patches import patchify, unpatchify
from nextblock.randomness import normals
from nextblock.xar.config import PRESETS, XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.objective import draw_times
from nextblock.xar.sampler import sample_latents

SMALL: dict[str, Any] = {
    "latent_size": (4, 6), "latent_channels": 3, "width": 16, "depth": 2, "num_heads": 2, "num_classes": 5,
    "dropout": 0.0, "attention_dropout": 0.0, "label_dropout": 0.0, "entity_size": 2,
}  # fmt: skip
ENTITIES: dict[str, dict[str, Any]] = {
    "patches": {"ordering": "patches"},
    "cells": {"ordering": "cells", "entity_size": 2},
    "rectangular cells": {"ordering": "cells", "entity_size": (2, 3)},
    "subsamples": {"ordering": "subsamples", "entity_size": (2, 3)},
    "scales": {"ordering": "scales"},
    "mean scales": {"ordering": "scales", "scales": ((1, 2), (4, 6)), "resize": "area", "loss_mean": "entities"},
    "whole": {"ordering": "whole"},
    "pixels in patches": {"ordering": "cells", "entity_size": 1, "patch_size": 2},
    "scales of pixels in patches": {"ordering": "scales", "patch_size": 2, "resize": "bilinear"},
    "odd sizes": {"ordering": "cells", "entity_size": (5, 1), "latent_size": (5, 7)},
    "odd scales": {"ordering": "scales", "latent_size": (5, 7)},
}
CONTEXTS = ("random", "clean", "increasing", "decreasing")


def make(name: str, **more: Any) -> XAR:
    torch.manual_seed(0)
    return XAR(XARConfig(**(SMALL | ENTITIES[name] | more))).double().eval()


def inputs(model: XAR, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, labels, times and entity-major noise."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    latents = torch.randn(batch, config.latent_channels, *config.latent, generator=generator).double()
    labels = torch.arange(batch) % 5
    times = torch.rand(batch, model.ordering.num_entities, generator=generator)
    noise = torch.randn(batch, model.ordering.num_tokens, config.token_channels, generator=generator).double()
    return latents, labels, times, noise


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ENTITIES)
def test_forward_backward_and_one_sample(name: str, context: str) -> None:
    model = make(name, context=context)
    latents, labels, times, noise = inputs(model)
    loss = model.loss(latents, labels, times=times, noise=noise)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss.item() > 0
    alone = model.loss(latents[:1], labels[:1], times=times[:1], noise=noise[:1])
    rest = model.loss(latents[1:], labels[1:], times=times[1:], noise=noise[1:])
    assert_close((alone + rest) / 2, loss, 1e-9)
    made = sample_latents(model, labels, steps=2, solver="heun")
    assert made.shape == latents.shape
    assert made.isfinite().all()


def test_latents_of_512_px() -> None:
    model = make("cells", latent_size=32, entity_size=16)
    latents, labels, times, noise = inputs(model, batch=1)
    assert model.ordering.entity_sizes == (256,) * 4
    assert model.loss(latents, labels, times=times, noise=noise) > 0
    assert sample_latents(model, labels, steps=1).shape == latents.shape


@pytest.mark.parametrize("name", [name for name in ENTITIES if name != "whole"])
def test_no_entity_sees_a_later_one(name: str) -> None:
    model = make(name)
    latents, labels, times, _ = inputs(model)
    tokens = patchify(latents, model.config.patch, model.ordering).requires_grad_()
    for entity in range(model.ordering.num_entities - 1):
        where = model.entity_range(entity)
        before = model.velocities(tokens, times, labels)[:, where]
        changed, late = tokens.detach().clone(), times.clone()
        changed[:, where.stop :] = 9.0
        late[:, entity + 1 :] = 0.5
        assert torch.equal(model.velocities(changed, late, labels)[:, where], before)
        (grad,) = torch.autograd.grad(before.sum(), tokens)
        assert not grad[:, where.stop :].any()
        assert grad[:, : where.stop].abs().sum(-1).bool().all()  # and it does see every token up to its own


@pytest.mark.parametrize("name", ["cells", "scales", "subsamples"])
def test_teacher_forcing_hides_an_entity_from_itself(name: str) -> None:
    """Noisy n must not move with clean n (nor later ones), and must move with every earlier clean one."""
    model = make(name, context="clean")
    latents, labels, times, noise = inputs(model)
    tokens = patchify(latents, model.config.patch, model.ordering)
    seen: list[Tensor] = []
    run = model._run
    model._run = lambda x, *rest: seen.append(run(x, *rest)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    model.loss(latents, labels, times=times, noise=noise)
    length = model.entity_range(model.ordering.num_entities - 1).start  # the last clean entity is seen by nobody
    clean, whole = tokens[:, :length].clone().requires_grad_(), model._doubled()
    t = times[:, model.entity, None].double()
    x = ((1 - t) * tokens + t * noise).requires_grad_()
    both = torch.cat((torch.zeros_like(times[:, 1:]), times), 1)
    out = run(torch.cat((clean, x), 1), both, labels, whole, model.mask)
    assert torch.equal(out, seen[0])  # the sequence that the loss runs is this one
    for entity in range(model.ordering.num_entities):
        where = model.entity_range(entity)
        by_clean, by_noisy = torch.autograd.grad(
            out[:, length + where.start : length + where.stop].sum(), (clean, x), retain_graph=True
        )
        assert not by_clean[:, where.start :].any()
        assert by_clean[:, : where.start].abs().sum(-1).bool().all()
        assert not by_noisy[:, : where.start].any()
        assert not by_noisy[:, where.stop :].any()


def test_a_clean_context_model_samples_what_its_loss_saw() -> None:
    """The doubled training pass and the cached sampling pass give the same velocities."""
    model = make("cells", context="clean")
    latents, labels, times, noise = inputs(model)
    tokens = patchify(latents, model.config.patch, model.ordering)
    t = times[:, model.entity, None].double()
    x = (1 - t) * tokens + t * noise
    both, clean = torch.cat((torch.zeros_like(times[:, 1:]), times), 1), tokens[:, : -tokens.shape[1] // 6]
    out = model._run(torch.cat((clean, x), 1), both, labels, model._doubled(), model.mask)[:, clean.shape[1] :]
    cache = model.new_cache()
    for entity in range(model.ordering.num_entities):
        where = model.entity_range(entity)
        now = times[:, entity : entity + 1]
        found = model.velocities(x[:, where], now, labels, first=entity, cache=cache, masked=False)
        assert_close(found, out[:, where], 1e-9)
        model.velocities(tokens[:, where], 0 * now, labels, first=entity, cache=cache, masked=False)
        cache.keep(where.stop - where.start)


@pytest.mark.parametrize("name", ENTITIES)
@pytest.mark.parametrize(
    ("schedule", "low", "high"), [("linear", 0.0, 1.0), ("linear", 0.5, 0.8), ("constant", 0.5, 0.8)]
)
def test_cached_sampling_is_uncached_sampling(name: str, schedule: str, low: float, high: float) -> None:
    model = make(name)
    labels, steps, scale = torch.tensor([1, 3]), 3, 2.0
    found = sample_latents(
        model, labels, steps=steps, solver="euler", guidance=scale, guidance_schedule=schedule, seed=7,
        guidance_interval=(low, high),
    )  # fmt: skip
    done = found.new_zeros(2, 0, model.config.token_channels).double()
    entities = model.ordering.num_entities
    for entity in range(entities):
        where = model.entity_range(entity)
        ramp = 1 + (scale - 1) * entity / (entities - 1) if entities > 1 and schedule == "linear" else scale
        shape = (where.stop - where.start, model.config.token_channels)
        x = normals(7, f"sample/entity{entity}/draw0", range(2), shape).double()
        for step in range(steps):
            times = torch.zeros(2, entity + 1)
            times[:, -1] = (steps - step) / steps
            both = [
                model.velocities(torch.cat((done, x), 1), times, which)[:, where]
                for which in (labels, torch.full_like(labels, model.null_label))
            ]
            g = ramp if low <= times[0, -1] <= high else 1.0
            x = x - (both[1] + g * (both[0] - both[1])) / steps
        done = torch.cat((done, x), 1)
    assert_close(found.double(), unpatchify(done, model.config.patch, model.ordering), 1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama", "multistep"])
def test_an_image_is_the_same_whatever_is_sampled_beside_it(solver: str) -> None:
    model, labels = make("cells"), torch.tensor([0, 1, 2, 3, 4])
    options: dict[str, Any] = {"steps": 3, "solver": solver, "guidance": 1.5, "seed": 3}
    together = sample_latents(model, labels, **options)
    two = sample_latents(model, labels[[3, 1]], indices=[3, 1], **options)
    assert_close(two, together[[3, 1]], 1e-6)
    other = sample_latents(model, labels[:1], **(options | {"seed": 4}))
    assert (other - together[:1]).abs().max() > 0.1


def test_unguided_entities_run_once_and_the_pass_that_fills_the_cache_twice() -> None:
    model, sizes = make("cells"), []
    model.norm_in.register_forward_hook(lambda _, given, x: sizes.append(len(x)))
    labels = torch.tensor([1, 2])
    sample_latents(model, labels, steps=3, solver="euler", guidance=2.0)
    entities = model.ordering.num_entities
    assert sizes == [2, 2, 2, 4] + [4, 4, 4, 4] * (entities - 2) + [4, 4, 4]  # the last entity is never cached
    sizes.clear()
    sample_latents(model, labels, steps=4, solver="euler", guidance=2.0, guidance_interval=(0.4, 0.8))
    assert sizes[5:10] == [2, 4, 4, 2, 4]  # t = 1, 0.75, 0.5, 0.25, then the clean pass
    sizes.clear()
    sample_latents(model, labels, steps=3, solver="euler", guidance=1.0)
    assert set(sizes) == {2}


def test_guidance_schedules() -> None:
    model, labels = make("cells"), torch.tensor([1, 2])
    options: dict[str, Any] = {"steps": 3, "solver": "euler"}
    none = sample_latents(model, labels, **options)
    linear = sample_latents(model, labels, guidance=3.0, **options)
    constant = sample_latents(model, labels, guidance=3.0, guidance_schedule="constant", **options)
    assert torch.equal(none[:, :, :2, :2], linear[:, :, :2, :2])  # the first cell is not guided
    assert not torch.equal(none[:, :, :2, 2:4], linear[:, :, :2, 2:4])
    assert not torch.equal(none[:, :, :2, :2], constant[:, :, :2, :2])
    whole = make("whole")
    alone = [sample_latents(whole, labels, guidance=g, **options) for g in (1.0, 3.0)]
    assert not torch.equal(*alone)  # one entity alone uses the full scale


def test_continuation_keeps_what_is_known_and_conditions_on_it() -> None:
    for name in ("cells", "scales"):
        model = make(name)
        latents, labels, _, _ = inputs(model)
        made = sample_latents(model, labels, steps=2, known=latents, num_known=2)
        tokens = patchify(made.double(), model.config.patch, model.ordering)
        if name == "cells":
            given = patchify(latents, model.config.patch, model.ordering)
            assert_close(tokens[:, :8], given[:, :8], 1e-6)
        other = sample_latents(model, labels, steps=2, known=latents + 1, num_known=2)
        last = patchify(other.double(), model.config.patch, model.ordering)[:, -4:]
        assert (last - tokens[:, -4:]).abs().max() > 1e-3
        everything = sample_latents(model, labels, known=latents, num_known=model.ordering.num_entities)
        assert_close(everything.double(), latents, 1e-6)
    with pytest.raises(ConfigError, match="num_known"):
        sample_latents(model, labels, num_known=1)


def test_watching_shows_the_entities_appear() -> None:
    for name in ("cells", "scales of pixels in patches"):
        model = make(name)
        seen: list[tuple[int, int, Tensor]] = []
        watch = lambda e, s, picture, seen=seen: seen.append((e, s, picture()))  # noqa: E731
        made = sample_latents(model, torch.tensor([1]), steps=2, solver="euler", watch=watch)
        assert [(e, s) for e, s, _ in seen] == [(e, s) for e in range(model.ordering.num_entities) for s in range(2)]
        assert all(x.shape == made.shape for _, _, x in seen)
        assert torch.equal(seen[-1][2], made)
        if name == "cells":
            assert not seen[1][2][:, :, 2:].any()


def test_times_are_sorted_the_way_they_say() -> None:
    uniforms = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    by = {c: draw_times(XARConfig(**(SMALL | {"context": c})), uniforms) for c in CONTEXTS}
    assert (by["increasing"].diff(dim=1) >= 0).all()
    assert (by["decreasing"].diff(dim=1) <= 0).all()
    assert torch.equal(by["random"], by["clean"])
    assert abs(float(by["random"].logit().mean())) < 0.05
    assert abs(float(by["random"].logit().std()) - 1) < 0.05
    flat = draw_times(XARConfig(**(SMALL | {"times": "uniform"})), uniforms)
    assert_close(flat, uniforms, 1e-6)
    edges = draw_times(XARConfig(**SMALL), torch.tensor([[0.0, 1 - 2**-24]]))
    assert ((edges > 0) & (edges < 1)).all()


def test_training_differs_from_evaluation_by_dropout_alone() -> None:
    model = make("cells")
    latents, labels, times, noise = inputs(model)
    evaluated = model.loss(latents, labels, times=times, noise=noise)
    assert torch.equal(model.train().loss(latents, labels, times=times, noise=noise), evaluated)
    for rate in ("dropout", "attention_dropout", "label_dropout"):
        dropping = make("cells", **{rate: 0.9})
        assert torch.equal(dropping.loss(latents, labels, times=times, noise=noise), evaluated)
        torch.manual_seed(0)
        assert not torch.equal(dropping.train().loss(latents, labels, times=times, noise=noise), evaluated)
    every = torch.ones(2, dtype=torch.bool)
    unlabelled = make("cells").loss(latents, torch.full((2,), 5), times=times, noise=noise)
    assert torch.equal(make("cells").loss(latents, labels, times=times, noise=noise, dropped=every), unlabelled)


def test_the_mean_over_entities_weighs_a_coarse_scale_as_much_as_a_fine_one() -> None:
    by = {mean: make("scales", loss_mean=mean) for mean in ("tokens", "entities")}
    latents, labels, times, noise = inputs(by["tokens"])
    losses = {mean: model.loss(latents, labels, times=times, noise=noise) for mean, model in by.items()}
    assert losses["tokens"] != losses["entities"]
    model = by["tokens"]
    tokens = patchify(latents, (1, 1), model.ordering)
    t = times[:, model.entity, None].double()
    errors = (model.velocities((1 - t) * tokens + t * noise, times, labels) - (noise - tokens)).square()
    assert_close(losses["tokens"], errors.mean(), 1e-9)
    parts = [errors[:, model.entity_range(e)].mean() for e in range(model.ordering.num_entities)]
    assert_close(losses["entities"], torch.stack(parts).mean(), 1e-9)


def test_published_sizes() -> None:
    with torch.device("meta"):
        found = {n: sum(p.numel() for p in XAR(XARConfig.preset(n)).parameters()) / 1e6 for n in PRESETS}
    assert round(found["xar_b"], 1) == 172.6
    assert round(found["xar_l"], 1) == 608.4
    assert round(found["xar_h"], 1) == 1186.0


def test_names_in_a_file() -> None:
    names = list(make("cells").state_dict())
    layer = [
        f"{part}.{kind}"
        for part in ("attn.qkv", "attn.out", "mlp.gate", "mlp.value", "mlp.out", "modulation")
        for kind in ("weight", "bias")
    ]
    assert names == [
        "position1", "position2", "tokens_in.weight", "tokens_in.bias", "norm_in.weight", "class_embedding.weight",
        "time_embedding.fc1.weight", "time_embedding.fc1.bias", "time_embedding.fc2.weight", "time_embedding.fc2.bias",
        *(f"layers.{i}.{name}" for i in range(2) for name in layer),
        "norm_middle.weight", "middle.weight", "middle.bias", "norm_out.weight", "tokens_out.weight",
        "tokens_out.bias",
    ]  # fmt: skip


def test_a_model_without_classes() -> None:
    model = make("cells", num_classes=0)
    latents, labels, times, noise = inputs(model)
    assert model.loss(latents, times=times, noise=noise) > 0
    assert sample_latents(model, count=3, steps=1).shape == (3, 3, 4, 6)
    with pytest.raises(ConfigError, match="unconditional"):
        sample_latents(model, count=3, guidance=2.0)
    with pytest.raises(ConfigError, match="no labels"):
        model.loss(latents, labels)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ordering": "cell"}, "Did you mean 'cells'"),
        ({"ordering": "cells", "entity_size": 4}, "do not fit a grid of 4×6"),
        ({"patch_size": 4}, "patch sizes that divide it: 1, 2"),
        ({"num_heads": 3}, "divisible by 4; nearest"),
        ({"context": "noisy"}, "random, clean"),
        ({"label_dropout": 1.0}, "label_dropout"),
        ({"ordering": "scales", "scales": (4, 2)}, "scales must grow"),
        ({"num_classes": -1}, "unconditional"),
    ],
)
def test_what_cannot_work_is_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        XARConfig(**(SMALL | wrong))
    with pytest.raises(ConfigError, match="Did you mean 'context'"):
        XARConfig.from_dict({"contxt": "clean"})


def test_calls_that_cannot_work_are_told() -> None:
    model = make("cells")
    latents, labels, times, noise = inputs(model)
    with pytest.raises(ConfigError, match=r"latents must be \[B, 3, 4, 6\]"):
        model.loss(latents[:, :, :3], labels)
    with pytest.raises(ConfigError, match="needs labels"):
        model.loss(latents)
    with pytest.raises(ConfigError, match="times must be"):
        model.loss(latents, labels, times=times[:, :2])
    with pytest.raises(ConfigError, match="noise must be"):
        model.loss(latents, labels, noise=noise[:, :2])
    for options, told in (
        ({"solver": "huen"}, "Did you mean 'heun'"),
        ({"steps": 0}, "steps"),
        ({"guidance_schedule": "cosine"}, "linear, constant"),
        ({"time_grid": "log"}, "time grid"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"indices": [1]}, "indices"),
        ({"indices": [-1, 0]}, "from 0"),
        ({"guidance": float("nan")}, "finite"),
        ({"guidance_interval": (0.1,)}, "guidance_interval"),
        ({"time_grid": [1, float("nan"), 0]}, "fall from 1"),
        ({"count": 3}, "without classes"),
        ({"draws": [noise]}, "draw 0 of entity 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            sample_latents(model, labels, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 to 4"):
        sample_latents(model, torch.tensor([0, 6]))
    with pytest.raises(ConfigError, match="whole numbers"):
        sample_latents(model, torch.tensor([0.5, 1.0]))
    for wrong in (-1, 6):
        with pytest.raises(ConfigError, match="0 to 4"):
            model.loss(latents, torch.tensor([0, wrong]))


def test_a_configuration_survives_a_file() -> None:
    for fields in ENTITIES.values():
        config = XARConfig(**(SMALL | fields))
        assert XARConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("context", ["random", "clean"])
@pytest.mark.parametrize("name", ["cells", "scales"])
def test_mixed_precision(name: str, context: str) -> None:
    model = make(name, context=context).float()
    latents, labels, times, noise = inputs(model)
    loss = model.loss(latents.float(), labels, times=times, noise=noise.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(latents.float(), labels, times=times, noise=noise.float())
        made = sample_latents(model, labels, steps=2, guidance=2.0)
    assert mixed.dtype == made.dtype == torch.float32
    assert_close(mixed, loss, 2e-2)
    mixed.backward()
    assert made.isfinite().all()


def test_sampling_drops_nothing_and_leaves_the_mode_as_it_was() -> None:
    model = make("cells", dropout=0.5, attention_dropout=0.5, label_dropout=0.5)
    labels = torch.tensor([1, 2])
    quiet = sample_latents(model, labels, steps=2)
    assert torch.equal(sample_latents(model.train(), labels, steps=2), quiet)
    assert model.training


def test_a_model_cast_to_bf16_knows_its_times() -> None:
    model = make("cells").float()
    times = torch.linspace(0, 0.999, 50)
    exact = model.time_embedding(times)
    cast = model.bfloat16().time_embedding(times).float()
    assert_close(cast, exact, 2e-2)


def test_the_last_clean_entity_is_left_out_of_teacher_forcing() -> None:
    lengths = []
    for name in ("cells", "whole", "scales"):
        model = make(name, context="clean")
        latents, labels, times, noise = inputs(model)
        run = model._run
        model._run = lambda x, *rest, run=run: lengths.append(x.shape[1]) or run(x, *rest)  # type: ignore[method-assign, misc]
        model.loss(latents, labels, times=times, noise=noise)
    assert lengths == [24 + 20, 24, 33 + 9]
