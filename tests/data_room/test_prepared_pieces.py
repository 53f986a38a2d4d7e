"""Pieces of prepared images: what is read is what was written, or the piece is made anew; who counts broken ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nextblock.data import shard_folder
from nextblock.data.prepared import pieces
from nextblock.data.prepared.about import About
from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.making import Maker, write_about
from nextblock.data.prepared.pieces import Image, bad_in_pieces, is_made, read_images, remove_pieces, write_piece
from nextblock.data.sources import open_source
from nextblock.data.stream import BadSample
from nextblock.errors import DataError

IMAGES = [
    Image(0, "a.jpg", 4, b"first", "jpeg", 500), BadSample("b\udcff.jpg", "the file is empty", 1),
    Image(2, "c.jpg", -1, b"third!", "raw", 7),
]  # fmt: skip
WHOLE = range(3)


def files(folder: Path) -> list[Path]:
    return sorted((folder / pieces.FOLDER).iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_piece(tmp_path, WHOLE, IMAGES)
    assert list(read_images(tmp_path, 3, 0)) == IMAGES
    assert list(read_images(tmp_path, 3, 2)) == IMAGES[2:]
    assert bad_in_pieces(tmp_path, 3) == [IMAGES[1]]


def test_no_flipped_bit_is_taken_for_what_was_written(tmp_path: Path) -> None:
    write_piece(tmp_path, WHOLE, IMAGES)
    whole = {file: file.read_bytes() for file in files(tmp_path)}
    noticed = dict.fromkeys(whole, 0)
    for file, content in whole.items():
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            try:
                assert list(read_images(tmp_path, 3, 0)) == IMAGES  # white space
            except DataError:
                noticed[file] += 1
                assert not is_made(tmp_path, WHOLE)
            for each, before in whole.items():
                each.write_bytes(before)
    assert [noticed[file] for file in whole if file.suffix == ".bin"] == [len(b"firstthird!")]
    assert all(noticed.values())


def test_a_damaged_piece_is_told_and_removed(tmp_path: Path) -> None:
    write_piece(tmp_path, WHOLE, IMAGES)
    file = tmp_path / pieces.FOLDER / "000000000-000000003.json"
    file.write_bytes(file.read_bytes().replace(b"4", b"5", 1))
    told = r"images 0 to 2, encoded for .*: it is not what was written. The same command makes them anew."
    with pytest.raises(DataError, match=told):
        list(read_images(tmp_path, 3, 0))
    assert not is_made(tmp_path, WHOLE)
    write_piece(tmp_path, WHOLE, IMAGES)
    file.write_bytes(b"{")
    assert bad_in_pieces(tmp_path, 3) == []
    assert not is_made(tmp_path, WHOLE)


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """30 images: every second one is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12) if i % 2 else b"no image")
    return open_source(folder)


def about(source: Any) -> About:
    return About(encoding=Encoding(), shard_mb=1, data={"count": len(source)}, classes=None)


def test_broken_images_of_pieces_that_are_there_count(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "IMAGES", 5)
    held: list[bool] = []

    @contextmanager
    def alone() -> Iterator[None]:
        held.append((tmp_path / "bad_samples.csv").exists())
        yield
        held.append((tmp_path / "bad_samples.csv").exists())

    maker = Maker(tmp_path, source, workers=0, max_bad=7, alone=alone)
    first, second, third = (pieces.pieces(30)[i : i + 2] for i in (0, 2, 4))
    maker.make_pieces(about(source), first)  # 5 broken ones
    with pytest.raises(DataError, match="8 images cannot be decoded, more than the 7 allowed"):
        maker.make_pieces(about(source), second, bad_in_pieces(tmp_path, 30))
    assert held == [False, True]
    maker.make_pieces(about(source), second)  # by a process that started at the same time as the first one
    before = [file.stat().st_mtime_ns for file in files(tmp_path)]
    with pytest.raises(DataError, match="10 images cannot be decoded, more than the 7 allowed"):
        maker.make_pieces(about(source), third, bad_in_pieces(tmp_path, 30))
    assert [file.stat().st_mtime_ns for file in files(tmp_path)] == before


def test_those_of_all_pieces_count_when_shards_are_made_of_them(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "IMAGES", 15)
    begun = about(source)
    write_about(tmp_path, begun)
    for piece in pieces.pieces(30):
        Maker(tmp_path, source, workers=0, max_bad=8).make_pieces(begun, [piece])
    with pytest.raises(DataError, match="9 images cannot be decoded, more than the 8 allowed"):
        Maker(tmp_path, source, workers=0, max_bad=8).make(begun, of_pieces=True)
    made = Maker(tmp_path, source, workers=0, max_bad=15).make(begun, of_pieces=True)
    assert (made.images, len(made.bad)) == (15, 15)


def test_broken_images_of_a_recorded_shard_count_once(source: Any, tmp_path: Path) -> None:
    """Its pieces may still be there: of a process that was killed before it removed them."""
    begun = about(source)
    write_about(tmp_path, begun)
    maker = Maker(tmp_path, source, workers=0, max_bad=15)
    made = maker.make(begun)
    maker.make_pieces(made, [], [BadSample("00.ppm", "broken", 0)])


def test_a_list_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 images .* The last one: a: empty \(no list of them: No such file"):
        shard_folder.require_few_bad(tmp_path / "none", [("a", "empty", 0)], 0)


def test_what_a_network_file_system_keeps_is_left_to_it(tmp_path: Path) -> None:
    write_piece(tmp_path, range(3), [])
    write_piece(tmp_path, range(3, 6), [])
    (tmp_path / ".pieces" / ".nfs00000000012").write_bytes(b"")
    remove_pieces(tmp_path, before=3)
    assert {path.name.partition(".")[0] for path in files(tmp_path)} >= {"000000003-000000006"}
    assert not list((tmp_path / ".pieces").glob("000000000-*"))
    assert (tmp_path / ".pieces" / ".nfs00000000012").exists()
