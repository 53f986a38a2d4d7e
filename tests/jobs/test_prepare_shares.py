"""Shares that meet broken images or damaged pieces: the cap is listed by one at a time, pieces are made anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nextblock.data import shard_folder
from nextblock.data.prepared import pieces
from nextblock.errors import DataError
from nextblock.jobs.cache_latents import cache_latents
from nextblock.jobs.prepare import prepare
from nextblock.jobs.share import VARIABLE, Units


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """24 images, 12 of which are broken."""
    folder = shutil.copytree(images, tmp_path / "images")
    for path in (folder / "left").iterdir():
        path.write_bytes(b"no image")
    return folder


def latents(data: Path, out: Path) -> None:
    from faults.victims import write_vae

    write_vae(out.parent / "vae")
    cache_latents(dataset=data, vae=out.parent / "vae", out=out, image_size_px=16, workers=0, quiet=True)


def prepared(data: Path, out: Path) -> None:
    prepare(data=data, out=out, workers=0, quiet=True)


@pytest.mark.parametrize("job", [latents, prepared])
def test_shares_list_what_is_broken_one_at_a_time(
    job: Callable[[Path, Path], None], broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, write = Units.alone, shard_folder.write_bad_samples
    held: list[Units] = []
    listed: list[int] = []

    @contextmanager
    def seen(units: Units) -> Iterator[None]:
        with alone(units):
            held.append(units)
            yield
            held.pop()

    def written(*arguments: Any) -> None:
        listed.append(len(held))
        write(*arguments)

    monkeypatch.setattr(Units, "alone", seen)
    monkeypatch.setattr(shard_folder, "write_bad_samples", written)
    monkeypatch.setenv(VARIABLE, "1/2")
    with pytest.raises(DataError, match="images cannot be decoded, more than the 10 allowed"):
        job(broken, tmp_path / "out")
    assert listed == [1]
    assert (tmp_path / "out" / "bad_samples.csv").is_file()


def test_a_damaged_piece_is_made_anew_by_the_same_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(images, tmp_path / "whole")
    monkeypatch.setattr(pieces, "IMAGES", 5)
    out = tmp_path / "out"
    monkeypatch.setenv(VARIABLE, "1/2")
    prepared(images, out)
    first = out / pieces.FOLDER / "000000000-000000005.json"
    whole = first.read_bytes()
    first.write_bytes(whole.replace(b"20", b"21", 1))
    prepared(images, out)
    assert first.read_bytes() == whole
    third = out / pieces.FOLDER / "000000010-000000015.bin"  # no share reads contents before they are put together
    third.write_bytes(third.read_bytes()[:-1])
    monkeypatch.setenv(VARIABLE, "2/2")
    told = "images 10 to 14, encoded for .*out, cannot be read: their contents are not what was written. The same"
    with pytest.raises(DataError, match=told):
        prepared(images, out)
    for share in ("2/2", "1/2"):
        monkeypatch.setenv(VARIABLE, share)
        prepared(images, out)
    assert content(out) == content(tmp_path / "whole")
