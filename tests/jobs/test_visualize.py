from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextblock as nb
from nextblock.checkpoints.pretrained import load_pretrained, save_pretrained
from nextblock.cli import _call
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation.features import FeatureConfig
from nextblock.evaluation.pca_maps import ColourBasis
from nextblock.jobs.opening import open_encoder
from nextblock.jobs.visualize import Visualized, visualize
from nextblock.jobs.visualize_seen import _looks
from nextblock.jobs.visualize_settings import checked_settings


@pytest.fixture(scope="module")
def made(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Visualized:
    out = tmp_path_factory.mktemp("visualize") / "new" / "page"
    return visualize(
        run=run, images=str(images), out=out, count=2, layers=[1, 2], heads=[1], tokens="1,2",
        among=str(images), neighbours=3, workers=0, quiet=True,
    )  # fmt: skip


def test_everything_is_there(made: Visualized) -> None:
    assert made.names == ["left/000.png", "top/000.png"]
    assert {picture.name for picture in made.pictures} == {
        "ordering.png", "features.png", "cell-sizes.png", "cell-sizes-changes.png", "neighbours.png",
        "attention-00-layer-1.png", "attention-00-layer-2.png", "attention-01-layer-1.png", "attention-01-layer-2.png",
    }  # fmt: skip
    kept = {path.name for path in made.folder.iterdir()}
    assert kept == {"index.html", "colours.npz", "visualize.json", *(path.name for path in made.pictures)}


def test_the_page_holds_every_picture(made: Visualized) -> None:
    page = made.page.read_text(encoding="utf-8")
    inside = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert sorted(inside) == sorted(path.read_bytes() for path in made.pictures)


def test_the_numbers(made: Visualized, run: Path, images: Path) -> None:
    numbers = json.loads(made.numbers.read_text())
    assert numbers["own_cells"] == "2×2"
    assert list(numbers["cell_size_cosines"]) == ["1×1", "2×2", "no mask"]
    assert numbers["cell_size_cosines"]["2×2"] == pytest.approx(1)
    assert numbers["patches"] == [[[1, 2]], [[1, 2]]]
    embedded = nb.embed(run=run, images=str(images), workers=0, quiet=True)
    unit = embedded.features / np.linalg.norm(embedded.features, axis=1, keepdims=True)
    for name, found in zip(made.names, numbers["neighbours"], strict=True):
        cosines = unit @ unit[embedded.names.index(name)]
        cosines[embedded.names.index(name)] = -1  # not its own neighbour
        best = np.argsort(-cosines)[:3]
        assert [one["cosine"] for one in found] == pytest.approx(cosines[best].tolist(), abs=1e-5)
        assert found[0]["name"] == embedded.names[best[0]]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_drawn_white_is_what_the_mask_hides(run: Path, bidirectional: bool) -> None:
    encoder, image = open_encoder(run, "cpu").encoder, torch.randn(1, 3, 16, 16)
    features = FeatureConfig(bidirectional=bidirectional)
    ordering = encoder.ordering_for(image, bidirectional)
    settings = checked_settings(encoder, ordering, features, None, None, "0,0 1,2 3,0 3,3")
    (looks,) = _looks(encoder, image, settings).values()
    assert [look.patch for look in looks] == [(0, 0), (1, 2), (3, 0), (3, 3)]
    for look in looks:
        assert ((look.weights > 0) == look.visible).all()
        assert look.weights.sum((1, 2)) == pytest.approx([1, 1])
        assert look.mean == pytest.approx(look.weights.mean(0))
    assert [int(look.visible.sum()) for look in looks] == ([16] * 4 if bidirectional else [4, 8, 12, 16])


def test_kept_colours_are_used_again(made: Visualized, run: Path, images: Path, tmp_path: Path) -> None:
    kept = {"run": run, "images": str(images / "top"), "count": 1, "heads": [0], "tokens": "0,0", "quiet": True}
    again = visualize(**kept, out=tmp_path / "again", colours=made.colours)
    assert again.colours.read_bytes() == made.colours.read_bytes()
    other = visualize(**kept, out=tmp_path / "other", last_layers=2)
    assert not np.array_equal(ColourBasis.load(other.colours).mean, ColourBasis.load(made.colours).mean)
    with pytest.raises(ConfigError, match=r"last_layers 1 there, 2 here"):
        visualize(**kept, out=tmp_path / "third", last_layers=2, colours=made.colours)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(("suffix", "pool"), [(".npz", True), (".parquet", False)])
def test_neighbours_in_a_file_of_features(
    made: Visualized, run: Path, images: Path, tmp_path: Path, suffix: str, pool: bool
) -> None:
    file = nb.embed(run=run, images=str(images), out=tmp_path / f"features{suffix}", pool=pool, workers=0, quiet=True)
    found = visualize(
        run=run, images=str(images), out=tmp_path / "out", count=2, heads=[0], tokens=[(0, 0)],
        among=file, among_images=str(images) if pool else None, neighbours=3, quiet=True,
    )  # fmt: skip
    ours, theirs = (json.loads(one.numbers.read_text())["neighbours"] for one in (found, made))
    assert [[one["name"] for one in row] for row in ours] == [[one["name"] for one in row] for row in theirs]
    same = (found.folder / "neighbours.png").read_bytes() == (made.folder / "neighbours.png").read_bytes()
    assert same == pool  # without the images their names alone are drawn


@pytest.fixture(scope="module")
def other(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the same sizes with other numbers."""
    model, values = load_pretrained(run / "exported")
    with torch.no_grad():
        model.encoder.patch_embed.weight.mul_(1.01)
    return save_pretrained(tmp_path_factory.mktemp("weights") / "other", model, values, "a card")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_of_other_features_is_refused(run: Path, other: Path, images: Path, tmp_path: Path, suffix: str) -> None:
    def embedded(name: str, run: Path = run, **options: bool | int) -> Path:
        return nb.embed(run=run, images=str(images), out=tmp_path / f"{name}{suffix}", workers=0, quiet=True, **options)

    def refused(match: str, among: Path, **options: int) -> None:
        given = {"run": run, "images": str(images), "out": tmp_path / "out", "count": 1, "heads": [0], "tokens": "0,0"}
        with pytest.raises(ConfigError, match=match):
            visualize(**given, among=among, quiet=True, **options)
        assert not (tmp_path / "out").exists()

    refused(rf"strange{suffix} holds features of another encoder", embedded("strange", other))
    refused("made with other options: last_layers 2 there, 1 here", embedded("two", last_layers=2))
    refused("bidirectional True there, False here", embedded("free", bidirectional=True))
    refused("final_norm True there, False here", embedded("normed", final_norm=True))
    refused(r"size_px \[16, 16\] there, \[24, 24\] here", embedded("same"), image_size_px=24)


def test_files_without_a_record_are_taken_with_a_warning(
    made: Visualized, run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = nb.embed(run=run, images=str(images), workers=0, quiet=True)
    np.savez(tmp_path / "old.npz", names=np.array(embedded.names), features=embedded.features)
    basis = ColourBasis.load(made.colours)
    assert len(basis.about.pop("weights")) == 64
    basis.save(tmp_path / "colours.npz")
    visualize(
        run=run, images=str(images), out=tmp_path / "out", count=1, heads=[0], tokens="0,0",
        among=tmp_path / "old.npz", colours=tmp_path / "colours.npz",
    )  # fmt: skip
    told = capsys.readouterr().out
    assert f"{tmp_path}/old.npz does not say of which encoder" in told
    assert f"{tmp_path}/colours.npz does not say of which encoder" in told


def test_colours_of_another_encoder_are_refused(made: Visualized, other: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"colours\.npz holds colours for features of another encoder"):
        visualize(run=other, images=str(images), out=tmp_path / "out", count=1, colours=made.colours, quiet=True)
    assert not (tmp_path / "out").exists()


def test_broken_images_are_left_out_and_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "$images$"  # two dollar signs make a formula of matplotlib
    folder.mkdir()
    for name in ("$a_$.png", "<img src=x>.png"):
        Image.fromarray(np.full((20, 20), 90, np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no")
    found = visualize(run=run, images=str(folder), out=tmp_path / "out", heads=[0], tokens="0,0")
    assert len(found.names) == 2
    assert [sample.name for sample in found.bad] == ["broken.png"]
    told = capsys.readouterr().out
    assert "left out: broken.png" in told
    assert "index.html" in told.replace("\n", "")
    page = found.page.read_text(encoding="utf-8")
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;.png" in page
    for path in folder.iterdir():
        path.write_bytes(b"no")
    with pytest.raises(DataError, match="none of the 3 images"):
        visualize(run=run, images=str(folder), out=tmp_path / "new" / "none", quiet=True)
    assert not (tmp_path / "new").exists()


WRONG = {
    "no patch 4,0: the grid has rows 0 to 3": {"tokens": "0,0 4,0"},
    "as in --tokens '3,4 7,7'; got '3'": {"tokens": "3"},
    "takes 1 to 12 patches": {"tokens": ""},
    "no layer 3: the encoder has 2, numbered from 1": {"layers": [1, 3]},
    "no head 2": {"heads": [2]},
    r"--last_layers must be between 1 and the depth \(2\); got 3": {"last_layers": 3},
    "--count must be at least 1": {"count": 0},
    "--count must be at most 64": {"count": 65},
    "24 images, less than --neighbours 25": {"among": "IMAGES", "neighbours": 25},
    "give that file as --among": {"among_images": "IMAGES"},
    "are images already": {"among": "IMAGES", "among_images": "IMAGES"},
    "does not divide into patches": {"image_size_px": 18},
    "cells of 2×2 do not fit": {"image_size_px": 20},
    "--image_size_px must be a size": {"image_size_px": -1},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_drawn_is_told_before_anything_is_made(
    run: Path, images: Path, tmp_path: Path, message: str
) -> None:
    options = {name: str(images) if value == "IMAGES" else value for name, value in WRONG[message].items()}
    with pytest.raises(ConfigError, match=message):
        visualize(run=run, images=str(images), out=tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_files_and_folders_that_will_not_do(run: Path, images: Path, tmp_path: Path) -> None:
    given = {"run": run, "images": str(images), "quiet": True}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        visualize(**given, out=tmp_path / "full")
    with pytest.raises(DataError, match=r"absent\.npz cannot be read as features"):
        visualize(**given, among=tmp_path / "absent.npz", out=tmp_path / "a")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read as features"):
        visualize(**given, among=tmp_path / "broken.parquet", out=tmp_path / "a")
    np.savez(tmp_path / "narrow.npz", names=np.array(list("abcde")), features=np.ones((5, 3), np.float32))
    with pytest.raises(ConfigError, match="3 dimensions, the queries' 16"):
        visualize(**given, among=tmp_path / "narrow.npz", out=tmp_path / "a")
    np.savez(tmp_path / "odd.npz", names=np.array(list("abcde")), features=np.ones(3, np.float32))
    with pytest.raises(DataError, match=r"\[M, D\]"):
        visualize(**given, among=tmp_path / "odd.npz", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_another_size_and_the_shell(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = [str(run), str(images / "top"), "--count", "1", "--image_size_px", "24", "--layers", "1", "2"]
    assert _call("visualize", visualize, {}, {}, [*args, "--tokens", "5,5 0,3", "--heads", "1", "--quiet"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("visualize-")
    numbers = json.loads((folder / "visualize.json").read_text())
    assert numbers["patches"] == [[[5, 5], [0, 3]]]
    assert list(numbers["cell_size_cosines"]) == ["1×1", "2×2", "3×3", "no mask"]
    assert len(list(folder.glob("attention-*.png"))) == 2
