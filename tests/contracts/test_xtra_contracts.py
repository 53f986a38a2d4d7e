"""What must hold for every XTRA model, whatever the ordering."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import nextblock as nb
from close import assert_close
from nextblock.errors import CheckpointError, ConfigError
from nextblock.layers.patches import entity_images, entity_pixels, patchify, unpatchify
from nextblock.xtra.objective import next_entity_loss, normalize_cells

GRID = (4, 6)
CELLS = nb.Ordering.cells(GRID, 2)
ORDERINGS = {
    "cells": CELLS,
    "patches": nb.Ordering.patches(GRID),
    "subsamples": nb.Ordering.subsamples(GRID, 2),
    "rectangular cells": nb.Ordering.cells(GRID, (2, 3)),
    "permuted cells": CELLS.permuted([3, 0, 5, 1, 4, 2]),
    "permuted subsamples": nb.Ordering.subsamples(GRID, 2).permuted([5, 0, 4, 1, 3, 2]),
}


def tiny(ordering: nb.Ordering = CELLS, **changes: object) -> nb.XTRA:
    values = {
        "image_size_px": (16, 24), "patch_size_px": 4, "cell_size": ordering.size, "width": 24, "depth": 2,
        "num_heads": 2, "predictor_width": 16, "predictor_depth": 2, "predictor_heads": 2, "head_hidden": 32,
    }  # fmt: skip
    torch.manual_seed(1)
    model = nb.XTRA(nb.XTRAConfig.from_dict(values | changes)).double()
    for parameter in model.parameters():  # zeros would hide what they multiply
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(batch: int = 2, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, 16, 24, generator=generator, dtype=torch.float64)


def full_sequence_loss(model: nb.XTRA, x: torch.Tensor, ordering: nb.Ordering) -> torch.Tensor:
    """The loss without dropping anything, written out as in the paper's formula."""
    heads = len(model.heads)
    predictions = [model.predict(x, head=i, ordering=ordering)[:, : -1 - i] for i in range(heads)]
    targets = normalize_cells(model.targets(x, ordering))
    return next_entity_loss(predictions, targets, model.config.pixel_loss)


@pytest.mark.parametrize("name", ORDERINGS)
@pytest.mark.parametrize("lookahead", [1, 2])
def test_dropping_the_last_entity_changes_nothing(name: str, lookahead: int) -> None:
    ordering = ORDERINGS[name]
    model, x = tiny(ordering, num_lookahead=lookahead), images()
    short = model.loss(x, ordering)
    short.backward()
    dropped = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    full = full_sequence_loss(model, x, ordering)
    full.backward()
    assert_close(short, full, 1e-12)
    assert set(dropped) == {n for n, _ in model.named_parameters()}
    for n, p in model.named_parameters():
        assert_close(dropped[n], p.grad, 1e-9)


@pytest.mark.parametrize("name", ORDERINGS)
def test_no_leak_from_later_entities(name: str) -> None:
    """Perturb an entity's pixels: features and predictions of earlier entities do not move, later ones do."""
    ordering = ORDERINGS[name]
    model, x = tiny(ordering).eval(), images(1)
    changed = ordering.num_entities // 2
    pixels = entity_pixels(x, (4, 4), ordering)
    pixels[:, changed] += 1.0
    y = entity_images(pixels, (4, 4), ordering)
    with torch.no_grad():
        before, after = model.predict(x, ordering=ordering), model.predict(y, ordering=ordering)
        *_, features_x = model.encoder.layer_outputs(x, ordering)
        *_, features_y = model.encoder.layer_outputs(y, ordering)
    tokens = changed * ordering.entity_size
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert torch.equal(features_x[:, :tokens], features_y[:, :tokens])
    assert all((before[:, e] != after[:, e]).any() for e in range(changed, ordering.num_entities))


@pytest.mark.parametrize("name", ORDERINGS)
def test_no_gradient_from_earlier_outputs_to_later_pixels(name: str) -> None:
    ordering = ORDERINGS[name]
    model, x = tiny(ordering).eval(), images(1).requires_grad_()
    entity = ordering.num_entities // 2
    model.predict(x, ordering=ordering)[:, :entity].square().sum().backward()
    assert x.grad is not None
    seen = entity_pixels(x.grad, (4, 4), ordering).abs().sum(-1)[0]
    assert (seen[:entity] > 0).all()
    assert (seen[entity:] == 0).all()


def test_bidirectional_attention_sees_everything() -> None:
    model, x = tiny().eval(), images(1)
    y = x.clone()
    y[..., -1, -1] += 1
    with torch.no_grad():
        moved = (model.encoder(x, bidirectional=True) != model.encoder(y, bidirectional=True)).any(-1)
        causal = (model.encoder(x) != model.encoder(y)).any(-1)
    assert moved.all()
    assert causal.sum() == 4  # the last cell


@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
def test_batch_of_one_equals_its_row_of_a_batch(ordering: nb.Ordering) -> None:
    model, x = tiny(ordering), images(3)
    alone = torch.stack([model.loss(x[i : i + 1], ordering) for i in range(3)])
    assert_close(alone.mean(), model.loss(x, ordering), 1e-12)


def test_features_come_back_in_raster_order() -> None:
    """With the same weights, the place of a patch in the output does not depend on the order of the cells."""
    model, x = tiny().eval(), images(1)
    changed = x.clone()
    changed[..., :4, 4:8] += 1  # raster patch 1
    with torch.no_grad():
        moved = (model.encoder(x) != model.encoder(changed)).any(-1)[0]
    assert moved[1]
    raster_of_first_cell = {0, 1, 6, 7}
    later = set(range(24)) - raster_of_first_cell
    assert all(moved[i] for i in later)


def test_eval_loss_is_train_loss_without_dropout() -> None:
    model, x = tiny(drop_path=0.3), images()
    keep_all = torch.full((2, 2, 2), 0.999, dtype=torch.float64)
    model.eval()
    evaluated = model.loss(x)
    model.train()
    model.encoder.layers.drop_path_rates.zero_()
    assert_close(model.loss(x, uniforms=keep_all), evaluated, 1e-12)


def test_drop_path_drops_whole_branches_of_whole_samples() -> None:
    model, x = tiny(drop_path=0.5).train(), images()
    drop_second_layer = torch.tensor([[[0.9, 0.9], [0.0, 0.0]]] * 2, dtype=torch.float64)
    first, second = model.encoder.layer_outputs(x, CELLS, uniforms=drop_second_layer)
    assert torch.equal(first, second)
    keep = torch.full((2, 2, 2), 0.9, dtype=torch.float64)
    first, second = model.encoder.layer_outputs(x, CELLS, uniforms=keep)
    model.eval()
    first_eval, second_eval = model.encoder.layer_outputs(x, CELLS)
    assert_close(first, first_eval, 1e-12)
    assert (second - first).abs().sum() > (second_eval - first_eval).abs().sum()


def test_pseudo_random_orders_begin_differently() -> None:
    orders = nb.XTRAConfig(order="pseudo_random", order_seed=3).orderings()
    assert len(orders) == 16
    assert len({o.order[0] for o in orders}) == 16
    assert orders == nb.XTRAConfig(order="pseudo_random", order_seed=3).orderings()
    assert orders != nb.XTRAConfig(order="pseudo_random", order_seed=4).orderings()


def test_loss_uses_the_first_order_unless_told() -> None:
    model, x = tiny(order="pseudo_random"), images()
    assert_close(model.loss(x), model.loss(x, model.orderings[0]), 1e-15)
    assert model.loss(x) != model.loss(x, model.orderings[1])


def test_other_channels_and_image_sizes() -> None:
    model = tiny(channels=1).eval()
    assert model.encoder(images(channels=1)).shape == (2, 24, 24)
    larger = torch.randn(1, 1, 32, 40, dtype=torch.float64)
    assert model.encoder(larger).shape == (1, 80, 24)
    assert model.loss(larger).isfinite()
    with pytest.raises(ConfigError, match=r"images \[B, 1, H, W\]"):
        model.encoder(images(channels=3))
    with pytest.raises(ConfigError, match="do not fit a grid"):
        model.encoder(torch.zeros(1, 1, 20, 24, dtype=torch.float64))
    assert model.encoder(torch.zeros(1, 1, 20, 24, dtype=torch.float64), bidirectional=True).shape == (1, 30, 24)


@pytest.mark.parametrize("ordering", ORDERINGS.values(), ids=ORDERINGS)
def test_patchify_round_trips(ordering: nb.Ordering) -> None:
    x = images()
    assert torch.equal(unpatchify(patchify(x, (4, 4), ordering), (4, 4), ordering), x)
    assert torch.equal(entity_images(entity_pixels(x, (4, 4), ordering), (4, 4), ordering), x)


def test_an_ordering_of_other_entities_is_refused() -> None:
    with pytest.raises(ConfigError, match="entities of 4 tokens; this ordering has 1"):
        tiny().loss(images(), nb.Ordering.patches(GRID))
    with pytest.raises(ConfigError, match="entities"):
        tiny(num_lookahead=5).loss(torch.zeros(1, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size_px": 225}, "not a multiple of patch_size_px 16; nearest sides that are: 224, 240"),
        ({"image_size_px": 224}, "do not fit a grid of 14×14"),
        ({"cell_size": 16}, "needs at least two"),
        ({"num_lookahead": 16}, "below the number of cells"),
        ({"width": 100}, "not divisible by num_heads 12; nearest"),
        ({"predictor_heads": 7}, "predictor_width 384 is not divisible by predictor_heads 7"),
        ({"pixel_loss": "l3"}, "'l2' or 'l1'"),
        ({"order": "spiral"}, "raster"),
        ({"drop_path": 1.0}, "below 1"),
        ({"depth": 0}, "at least 1"),
        ({"widht": 64}, "Did you mean 'width'"),
    ],
)
def test_bad_configurations_say_what_would_be_right(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nb.XTRAConfig.from_dict(values)


def test_targets_without_variance_are_warned_of() -> None:
    one_pixel = {"image_size_px": 8, "patch_size_px": 1, "cell_size": 1, "channels": 1}
    with pytest.warns(UserWarning, match="no variance"):
        config = nb.XTRAConfig.from_dict(one_pixel | {"width": 12, "depth": 1, "predictor_depth": 1})
    assert nb.XTRA(config).loss(torch.randn(2, 1, 8, 8)).isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nb.XTRAConfig.from_dict(one_pixel | {"normalize_targets": False})


def test_configuration_round_trip() -> None:
    config = tiny(order="pseudo_random").config
    assert nb.XTRAConfig.from_dict(config.to_dict()) == config


def test_published_sizes() -> None:
    """Parameters in millions: encoder, projection, predictor, heads, total (arXiv 2411.15648 and its code)."""
    published = {
        "xtra_b16": (85.8, 6.3, 56.9, 151.0, 300.1),
        "xtra_h14": (630.8, 9.8, 39.6, 184.9, 865.0),
    }
    for name, sizes in published.items():
        with torch.device("meta"):
            model = nb.XTRA(nb.XTRAConfig.preset(name))
        parts = (model.encoder, model.projection, model.predictor, model.heads, model)
        assert tuple(round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in parts) == sizes


def test_every_preset_trains() -> None:
    from nextblock.xtra.config import PRESETS

    for name in PRESETS:
        config = nb.XTRAConfig.preset(name, depth=1, predictor_depth=1, image_size_px=56, patch_size_px=14, cell_size=2)
        nb.XTRA(config).loss(torch.randn(1, 3, 56, 56)).backward()


def test_initialisation_table() -> None:
    torch.manual_seed(0)
    model = nb.XTRA(nb.XTRAConfig(image_size_px=64, cell_size=2, width=192, num_heads=3, depth=2))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name == "encoder.patch_embed.weight":
            assert p.std().item() == pytest.approx((2 / (3 * 16 * 16)) ** 0.5, rel=0.05)
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name


def test_state_dict_names_are_pinned() -> None:
    model = tiny(depth=1, predictor_depth=1)
    layer = [
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.out.weight", "attn.out.bias",
        "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    assert list(model.state_dict()) == [
        "encoder.position", "encoder.patch_embed.weight", "encoder.patch_embed.bias",
        *(f"encoder.layers.layers.0.{name}" for name in layer), "encoder.norm.weight", "encoder.norm.bias",
        "projection.fc1.weight", "projection.fc1.bias", "projection.fc2.weight",
        "predictor.position", *(f"predictor.layers.layers.0.{name}" for name in layer),
        "predictor.norm.weight", "predictor.norm.bias",
        "heads.0.fc1.weight", "heads.0.fc1.bias", "heads.0.fc2.weight", "heads.0.fc2.bias",
    ]  # fmt: skip


def test_an_official_checkpoint_that_does_not_fit_is_refused_with_the_lists(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data"
    config = nb.XTRAConfig(
        image_size_px=32, patch_size_px=4, cell_size=2, width=48, depth=4, num_heads=3, projection_hidden=64,
        predictor_width=32, predictor_depth=1, predictor_heads=4, head_hidden=90,
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        nb.load_official_xtra(data / "xtra_base.ckpt", config)
    told = str(caught.value)
    assert "missing (12): enc.blocks.3.norm1.weight" in told
    assert "unexpected (12): predictor.blocks.1.norm1.weight" in told
    assert "misshaped (3): aim_proj.0.mlp.0.weight (96, 128), expected (90, 128)" in told
    with pytest.raises(CheckpointError, match="No such file"):
        nb.load_official_xtra(tmp_path / "none.ckpt", config)
    (tmp_path / "text.ckpt").write_text("not weights")
    with pytest.raises(CheckpointError, match="read safely"):
        nb.load_official_xtra(tmp_path / "text.ckpt", config)
