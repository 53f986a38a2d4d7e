"""The numbers of the official XTRA code (see tests/data/README.md), in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nextblock as nb
from close import assert_close
from nextblock.checkpoints.official import our_name

DATA = Path(__file__).parents[1] / "data"
CASES = ["base", "l1", "lookahead2", "rawpix", "pseudo_random"]


def load(case: str) -> tuple[nb.XTRA, dict[str, np.ndarray]]:
    sizes = json.loads((DATA / f"xtra_{case}.json").read_text())
    config = nb.XTRAConfig(
        image_size_px=sizes["img_size"],
        patch_size_px=sizes["patch_size"],
        cell_size=sizes["block_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        projection_hidden=sizes["proj_hidden"],
        predictor_width=sizes["pred_dim"],
        predictor_depth=sizes["pred_depth"],
        predictor_heads=sizes["pred_heads"],
        head_hidden=sizes["head_hidden"],
        num_lookahead=sizes.get("num_lookahead", 1),
        pixel_loss="l1" if sizes.get("l1") else "l2",
        normalize_targets=sizes.get("norm_pix", True),
        order="pseudo_random" if sizes.get("pseudo_random") else "raster",
    )
    model = nb.load_official_xtra(DATA / f"xtra_{case}.ckpt", config).double()
    return model, dict(np.load(DATA / f"xtra_{case}.npz"))


def official_order(model: nb.XTRA, golden: dict[str, np.ndarray]) -> nb.Ordering | None:
    if "block_order" not in golden:
        return None
    return model.config.ordering.permuted(np.argsort(golden["block_order"][0]))


@pytest.mark.parametrize("case", CASES)
def test_encoder_tokens_and_features(case: str) -> None:
    model, golden = load(case)
    images = torch.from_numpy(golden["images"]).double()
    with torch.no_grad():
        assert_close(model.encoder(images), golden["encoder_tokens"], 1e-6)
        assert_close(model.encoder.features(images, last_layers=2), golden["features_last2_mean"], 1e-6)
        assert_close(model.encoder.features(images).mean(1), golden["features_last1_avgpool"], 1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c != "pseudo_random"])
def test_predictions_and_targets(case: str) -> None:
    model, golden = load(case)
    images = torch.from_numpy(golden["images"]).double()
    with torch.no_grad():
        assert_close(model.predict(images, head=0), golden["predictions"], 1e-6)
        assert_close(model.targets(images), golden["targets"], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_norms(case: str) -> None:
    model, golden = load(case)
    loss = model.loss(torch.from_numpy(golden["images"]).double(), ordering=official_order(model, golden))
    assert_close(loss, golden["loss"], 1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    official = {k.removeprefix("grad_norm/"): v for k, v in golden.items() if k.startswith("grad_norm/")}
    if case == "base":
        assert len(official) == len(gradients)
    for name, norm in official.items():
        gradient = gradients[our_name(name) or ""]
        assert gradient is not None
        assert_close(gradient.norm(), norm, 1e-5)


def test_token_order_is_the_official_one() -> None:
    model, golden = load("pseudo_random")
    base = model.config.ordering
    for cells, tokens in zip(golden["block_order"], golden["token_order"], strict=True):
        # The official code keeps the tokens in raster order of the image made of the permuted cells.
        rearranged = base.merge(base.permuted(np.argsort(cells)).sequence[None])
        assert rearranged.flatten().tolist() == tokens.tolist()
