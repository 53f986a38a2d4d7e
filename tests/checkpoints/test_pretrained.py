"""The weights folder: what the models' own methods write and read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock import XAR, XTRA, Classifier, Encoder, Preprocessing, XARConfig, XTRAConfig
from nextblock.checkpoints import hub
from nextblock.checkpoints.pretrained import find_folder, load_pretrained, save_pretrained
from nextblock.errors import CheckpointError
from nextblock.xtra.classifier import HeadConfig, LayerMean
from nextblock.xtra.heads import make_heads

TINY = XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=2, num_heads=2, head_hidden=8)
GENERATOR = XARConfig(latent_size=4, latent_channels=2, entity_size=2, width=16, depth=2, num_heads=2, num_classes=3)
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _classifier() -> Classifier:
    return Classifier(TINY, HeadConfig("attentive", LayerMean(1, 2), num_heads=2), ("cat", "dog", "owl"))


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "model", [XTRA(TINY), Encoder(TINY), _classifier(), XAR(GENERATOR)], ids=lambda m: type(m).__name__
)
def test_a_model_comes_back_as_it_was_saved(model: Any, tmp_path: Path) -> None:
    again = type(model).from_pretrained(model.save_pretrained(tmp_path / "kept"))
    assert _same(model, again)
    assert again.config == model.config
    assert not again.training
    assert (tmp_path / "kept" / "README.md").read_text().startswith("---\nlibrary_name: nextblock\n")


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_lone_head_comes_back(kind: Any, tmp_path: Path) -> None:
    head = make_heads(kind, 16, 5, num_heads=4, num_queries=2)
    again, _ = load_pretrained(save_pretrained(tmp_path / "head", head, {}, "a card"))
    assert _same(head, again)
    assert torch.equal(head.eval()(IMAGES.flatten(2)[:, :, :16]), again.eval()(IMAGES.flatten(2)[:, :, :16]))


@pytest.mark.parametrize("model", [XTRA(TINY), _classifier()], ids=["XTRA", "Classifier"])
def test_the_encoder_of_a_larger_model_is_had_alone(model: Any, tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(model.save_pretrained(tmp_path / "kept"))
    assert torch.equal(encoder(IMAGES), model.eval().encoder(IMAGES))


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    Encoder(TINY).save_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="holds an encoder, not a pre-trained model with its predictor"):
        XTRA.from_pretrained(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="holds an encoder, not a generator"):
        XAR.from_pretrained(tmp_path / "encoder")


def test_what_belongs_to_the_weights_goes_along(tmp_path: Path) -> None:
    model = XTRA(TINY)
    values = Preprocessing((16, 16), mean=(0.1, 0.2, 0.3)).to_dict()
    save_pretrained(tmp_path / "first", model, values, "a card", {"origin": "a lake"})
    opened = XTRA.from_pretrained(tmp_path / "first")
    opened.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "preprocessor_config.json").read_text())["mean"] == [0.1, 0.2, 0.3]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["origin"] == "a lake"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = Encoder(TINY)
    model.save_pretrained(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="exists already and is not overwritten"):
        model.save_pretrained(tmp_path / "kept")


def test_a_finished_run_is_opened_by_its_folder(tmp_path: Path) -> None:
    model = XTRA(TINY)
    model.save_pretrained(tmp_path / "run" / "exported")
    assert _same(model, XTRA.from_pretrained(tmp_path / "run"))


def test_preprocessing_makes_the_input_of_the_model(tmp_path: Path) -> None:
    Encoder(TINY).save_pretrained(tmp_path / "kept")
    preprocessing = Preprocessing.from_pretrained(tmp_path / "kept")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    from_array, from_file = preprocessing(pixels), preprocessing(tmp_path / "photo.png")
    both = preprocessing([Image.fromarray(pixels), pixels])
    assert from_array.shape == (1, 3, 16, 16)
    assert torch.equal(from_array, from_file)
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[:1], from_array)


def _changed(folder: Path, **values: Any) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | values))


def test_damage_and_strangers_are_told(tmp_path: Path) -> None:
    model = XTRA(TINY)

    def folder(name: str) -> Path:
        return Path(model.save_pretrained(tmp_path / name))

    def told(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            XTRA.from_pretrained(path)
        return str(error.value)

    cut = folder("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-9])
    assert "damaged" in told(cut)
    newer = folder("newer")
    _changed(newer, format=99, nextblock="7.0")
    assert "newer nextblock (7.0, format 99)" in told(newer)
    assert "pip install --upgrade" in told(newer)
    other = folder("other")
    _changed(other, config=TINY.to_dict() | {"width": 32})
    assert "belong to another configuration" in told(other)
    small = folder("small")
    _changed(small, config=TINY.to_dict() | {"width": 8, "predictor_width": 8})
    assert "misshaped" in told(small)
    bombs: dict[str, dict[str, Any]] = {
        "ratio": {"mlp_ratio": 2e8}, "grid": {"image_size_px": [4000, 4000]},
        "predictor": {"predictor_width": 12000, "predictor_heads": 1},
    }  # fmt: skip
    for name, bomb in bombs.items():
        path = folder(name)
        _changed(path, config=TINY.to_dict() | bomb)
        assert any(what in told(path) for what in ("too few for the sizes", "positions; more than"))
    for name, change in {"heads": {"num_heads": 4}, "cells": {"cell_size": 4, "image_size_px": [16, 16]}}.items():
        silent = folder(name)
        _changed(silent, config=TINY.to_dict() | change)
        if name == "heads":  # the weights fit, and the features would be others
            assert "config.json was changed since it was written" in told(silent)
    odd = folder("odd")
    _changed(odd, model_type="xtro")
    assert "Did you mean 'xtra'" in told(odd)
    unknown = folder("unknown")
    _changed(unknown, config=TINY.to_dict() | {"widht": 32})
    assert "widht" in told(unknown)
    huge = folder("huge")
    _changed(huge, config=TINY.to_dict() | {"width": 2**40})
    assert "too few for the sizes in config.json" in told(huge)
    deep = folder("deep")
    _changed(deep, config=TINY.to_dict() | {"depth": 10**9})
    assert "too few for the sizes in config.json" in told(deep)
    lacking = folder("lacking")
    (lacking / "model.safetensors").unlink()
    assert "model.safetensors is missing" in told(lacking)
    text = folder("text")
    (text / "config.json").write_text("[1, 2]")
    assert "no table of names" in told(text)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in told(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="has no revisions"):
        find_folder(cut, "main")


CHANGES: dict[str, dict[str, Any]] = {
    "config.json": {"classes": ["cat", "cow", "owl"]}, "another value": {"origin": "a sea"},
    "preprocessor_config.json": {"mean": [0.5, 0.5, 0.6]},
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_said_beside_the_weights_is_what_was_written(what: str, tmp_path: Path) -> None:
    values = Preprocessing((16, 16)).to_dict()
    folder = save_pretrained(tmp_path / "kept", _classifier(), values, "a card", {"origin": "a lake"})
    file = folder / (what if what.endswith(".json") else "config.json")
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | CHANGES[what]))
    with pytest.raises(CheckpointError, match=rf"{file.name} was changed since it was written.*remove \w*sha256 there"):
        load_pretrained(folder)
    lacking = said | CHANGES[what]  # as it was written before there was a hash
    del lacking["sha256" if "processor" in what else "about_sha256"]
    file.write_text(json.dumps(lacking))
    load_pretrained(folder)
    if "processor" not in what:
        for name in ("about_sha257", "config_sha25v"):  # which one wrong bit makes of a hash's name
            file.write_text(json.dumps(lacking | {name: "0" * 64}))
            with pytest.raises(CheckpointError, match=r"config\.json was changed"):
                load_pretrained(folder)
        file.write_text(json.dumps(said | CHANGES[what] | {"transformers_version": "5"}))  # written anew by others
        load_pretrained(folder)


def test_a_name_goes_to_the_hub_unless_its_folder_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> Path:
        asked.append((name, options["revision"]))
        return tmp_path / "kept"

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    model = Encoder(TINY)
    model.save_pretrained(tmp_path / "kept")
    assert _same(model, Encoder.from_pretrained("somebody/model", revision="v1"))
    assert asked == [("somebody/model", "v1")]
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no weights folder at runs/mime\. Did you mean 'mine'"):
        Encoder.from_pretrained("runs/mime")
    assert len(asked) == 1
    Encoder.from_pretrained("hf:runs/mime")
    assert len(asked) == 2


def test_pushing_hands_every_file_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def push(folder: Path, name: str, **options: Any) -> str:
        pushed.update(options, name=name, there=sorted(p.name for p in folder.iterdir()))
        return f"https://example.org/{name}"

    monkeypatch.setattr(hub, "push", push)
    assert Encoder(TINY).push_to_hub("somebody/model", private=True) == "https://example.org/somebody/model"
    assert pushed["private"] is True
    assert set(pushed["files"]) <= set(pushed["there"])
    assert set(pushed["files"]) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json",
                                    "modeling_nextblock.py"}  # fmt: skip


def test_a_feature_map_is_the_features_as_a_picture() -> None:
    encoder = Encoder(TINY).eval()
    features = encoder.features(IMAGES, 2)  # [2, 16, D]
    found = encoder.feature_map(IMAGES, 2)
    assert found.shape == (2, 16, 4, 4)
    assert torch.equal(found.flatten(2).mT, features)
    wide = torch.rand(1, 3, 24, 40)
    assert encoder.feature_map(wide).shape == (1, 16, 6, 10)
    assert encoder.feature_map(torch.rand(1, 3, 17, 30), pad=True).shape == (1, 16, 5, 8)  # padded to 6 rows of patches
    odd = torch.rand(1, 3, 21, 30)
    with pytest.raises(Exception, match="does not divide into patches"):
        encoder.feature_map(odd)
    padded = encoder.feature_map(odd, pad=True)
    assert padded.shape == (1, 16, 6, 8)
    assert torch.equal(
        padded[..., :5, :7], encoder.feature_map(torch.nn.functional.pad(odd, (0, 2, 0, 3)))[..., :5, :7]
    )


def test_loading_leaves_initialisation_out_and_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = torch.nn.init.trunc_normal_
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *a, **k: drawn.append("") or draw(*a, **k))
    XTRA(TINY).save_pretrained(tmp_path / "kept")
    assert drawn
    drawn.clear()
    XTRA.from_pretrained(tmp_path / "kept")
    assert not drawn
    XTRA(TINY)
    assert drawn
