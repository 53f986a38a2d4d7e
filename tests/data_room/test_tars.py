"""Tar shards: every kind of tar, samples and labels, the cached index, what is refused, and an exact stream."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nextblock.data.augment import CropConfig
from nextblock.data.decode import decode
from nextblock.data.loading import training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import (
    Source,
    content_digest,
    explain_change,
    fingerprint,
    open_source,
    tar_index,
    tar_local,
    write_manifest,
)
from nextblock.data.sources.tar_names import expanded
from nextblock.data.sources.tars import TarSource
from nextblock.data.stream import TrainingStream
from nextblock.errors import DataError
from tar_shards import png, write_shards, write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(folder))
    return folder


def values(source: Source) -> list[int]:
    """What `png` drew."""
    pixels = [decode(source[i].content, source.name(i))[0, 0] for i in range(len(source))]
    return [int(r) + 256 * int(g) for r, g, _ in pixels]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


# --- opening


def test_shards_open_in_every_way(tmp_path) -> None:
    paths = write_shards(tmp_path / "shards", [3, 1, 4])
    pattern = f"{tmp_path}/shards/train-{{000000..000002}}.tar"
    for spec in (tmp_path / "shards", f"{tmp_path}/shards/*.tar", pattern, paths, paths[::-1], [pattern]):
        source = open_source(spec)
        assert isinstance(source, Source)
        assert values(source) == list(range(8))
        assert names(source)[2:4] == ["train-000000.tar/00002.png", "train-000001.tar/00003.png"]
        assert source.labels().tolist() == [n % 3 for n in range(8)]
        assert [source[i].label for i in range(8)] == [n % 3 for n in range(8)]
        assert source.classes is None
    assert source.labels().dtype == np.int64
    assert source.description == "3 tars: 8 images in 3 tars, with labels"
    assert open_source(pattern).description == f"{pattern}: 8 images in 3 tars, with labels"
    assert values(open_source(paths[1])) == [3]
    again = pickle.loads(pickle.dumps(source))
    assert names(again) == names(source)
    with pytest.raises(IndexError):
        source[8]
    with pytest.raises(IndexError):
        source.name(-1)


def test_a_folder_of_tars_may_hold_splits_and_other_files(tmp_path) -> None:
    for split, size in (("train", 3), ("val", 2)):
        write_shards(tmp_path / "one", [size], name=f"set-{split}-{{:03d}}.tar")
        write_shards(tmp_path / "two" / split, [size], name="{:03d}.tar")
    (tmp_path / "one" / "sizes.json").write_text("{}")
    for folder in ("one", "two"):
        assert len(open_source(tmp_path / folder)) == 3
        assert len(open_source(tmp_path / folder, split="test")) == 2
    (tmp_path / "one" / "picture.png").write_bytes(png())
    assert not isinstance(open_source(tmp_path / "one"), TarSource)


def test_braces() -> None:
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("a-{8..10}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar"]
    assert expanded("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    for wrong, why in {"{3..1}": "upwards", "{1}": "neither", "{0..9": "other half", "{0..9999999}": "at most"}.items():
        with pytest.raises(DataError, match=why):
            expanded(f"a-{wrong}.tar")


def test_shards_that_are_not_there_are_named(tmp_path) -> None:
    write_shards(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"2 of the 4 tars of .* not there: .*train-000002.tar, .*3.tar\.$"):
        open_source(f"{tmp_path}/train-{{000000..000003}}.tar")
    with pytest.raises(DataError, match=r"no such file.*train-00000.tar. Did you mean 'train-00000[01].tar'"):
        open_source(f"{tmp_path}/train-00000.tar")
    with pytest.raises(DataError, match=r"^no such file or folder: a/b.tar\.$"):
        open_source("a/b.tar")


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "t-0.tar")
    (tmp_path / "t-1.tar").mkdir()
    for number in range(2):
        with pytest.raises(DataError, match=r"t-[01]\.tar is a folder, a pipe or a device"):
            open_source(f"{tmp_path}/t-{{{number}..{number}}}.tar")


# --- samples and labels


def test_samples_are_what_shares_a_name_up_to_the_first_dot(tmp_path) -> None:
    members = {
        "./a.b/x.jpg": png(1), "./a.b/x.cls": b"4\n", "./a.b/x.seg.png": png(9), "/y.PNG": png(2), "y.jpeg": png(3),
        "z.txt": b"no image", "z.json": b'{"label": 7}', "late.cls": b"5", "._y.png": b"?", ".DS_Store": b"?",
        "plain": b"?", "late.gif": png(5),
    }  # fmt: skip
    source = open_source(write_tar(tmp_path / "t.tar", members))
    assert names(source) == ["t.tar/a.b/x.jpg", "t.tar/y.jpeg", "t.tar/late.gif"]
    assert values(source) == [1, 3, 5]
    assert source.labels().tolist() == [4, -1, 5]
    assert source[1].label is None
    left_out = "left out: 2 hidden files, 1 names without a dot, 1 samples without an image"
    assert left_out in source.description


def test_which_member_is_the_image_and_where_the_label_is(tmp_path) -> None:
    members = {"a.jpg": png(1), "a.seg.png": png(2), "a.cls": b"1", "a.json": b'{"label": 8, "fine": 9, "s": "x"}'}
    tar = write_tar(tmp_path / "t.tar", members)
    assert values(open_source(tar, image_column="seg.png")) == [2]
    assert open_source(tar).labels().tolist() == [1]
    assert open_source(tar, label_column="label").labels().tolist() == [8]
    assert open_source(tar, label_column="fine").labels().tolist() == [9]
    assert open_source(tar, label_column="cls").labels().tolist() == [1]
    with pytest.raises(DataError, match="no sample has the label 'cours'"):
        open_source(tar, label_column="cours")
    with pytest.raises(DataError, match=r"a.json: has the s 'x'; a class number"):
        open_source(tar, label_column="s")
    with pytest.raises(DataError, match=r"holds no '.seg.pn' \(seen: .*1 .seg.png.* Did you mean 'seg.png'"):
        open_source(tar, image_column="seg.pn")
    source = open_source(write_shards(tmp_path / "json", [5], labels="json"))
    assert source.labels().tolist() == [0, 1, 2, 0, 1]
    assert open_source(write_shards(tmp_path / "none", [2], labels="")).labels() is None
    text = write_tar(tmp_path / "text.tar", {"a.png": png(), "a.json": b'{"label": "cat"}'})
    assert open_source(text).labels() is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": png(), "a.cls": b"cat"}, r"byte 1024: a.cls: holds 'cat'; a class number as text"),
        ({"a.jpg": png(), "a.cls": b"9" * 100}, "a.cls: holds ''; a class number"),
        ({"a.jpg": png(), "a.cls": b"99999999999"}, "label 99999999999; a class number lies between 0 and 2147483647"),
        ({"a.jpg": png(), "a.json": b"{"}, "a.json: cannot be read as JSON"),
        ({"a.jpg": png(), "a.json": b"[" * 100_000}, "a.json: cannot be read as JSON"),
        ({"a.jpg": png(), "x/../a.jpg": png()}, ""),
        ({"b.jpg": png(), "a.jpg": png(), "./a.jpg": png()}, r"byte 2048: ./a.jpg: this name is there twice"),
        ({"a.txt": b""}, r"holds no image \(seen: 1 .txt\). Accepted: .jpg"),
        ({"readme": b""}, "holds no samples: members such as 0001.jpg"),
    ],
)
def test_members_that_cannot_be_used(tmp_path, members, message) -> None:
    tar = write_tar(tmp_path / "t.tar", members)
    if not message:
        source = open_source(tar)
        assert names(source) == ["t.tar/a.jpg"]
        assert "left out: 1 names with '..'" in source.description
        return
    with pytest.raises(DataError, match=message):
        open_source(tar)


def test_links_and_devices_are_no_images(tmp_path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    kinds = {"sym.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "fifo.png": tarfile.FIFOTYPE,
             "null.png": tarfile.CHRTYPE, "folder.png": tarfile.DIRTYPE}  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in kinds.items():
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, str(secret)
            tar.addfile(about)
        about = tarfile.TarInfo("a.png")
        about.size = len(png(1))
        tar.addfile(about, io.BytesIO(png(1)))
    source = open_source(tmp_path / "t.tar")
    assert values(source) == [1]
    assert source.description.endswith("left out: 2 devices, 2 links")


# --- tars


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path, format) -> None:
    long = "d" * 60 + "/" + "n" * 70 + ".png"
    longest = "d" * 200 + "/" + "ü" * 100 + ".png"
    given = {"a.png": png(1), long: png(2)} | ({} if format == tarfile.USTAR_FORMAT else {longest: png(3)})
    source = open_source(write_tar(tmp_path / "t.tar", given, format))
    assert names(source) == [f"t.tar/{name}" for name in given]
    assert values(source) == [1, 2, 3][: len(given)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("./a.png", "a.png"),
        ("/././/a.png", "a.png"),
        (".//b/./a.png", "b/./a.png"),
        (".a/b.png", ".a/b.png"),
        ("./.a/b.png", ".a/b.png"),
        (".../b.png", ".../b.png"),
        ("/" * 2**18 + "a.png", "a.png"),  # a quarter of a megabyte, which once took a minute
        ("./" * 2**17 + "a.png", "a.png"),
    ],
)
def test_what_only_says_here_is_left_out_of_names(tmp_path, given, name) -> None:
    path = write_tar(tmp_path / "t.tar", {given: png(1)})
    start = time.monotonic()
    assert names(open_source(path)) == [f"t.tar/{name}"]
    assert time.monotonic() - start < 2


def test_names_that_are_not_unicode(tmp_path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        about = tarfile.TarInfo(os.fsdecode(b"\xff\n.png"))
        about.size = len(png())
        tar.addfile(about, io.BytesIO(png()))
    source = open_source(tmp_path / "t.tar")
    assert os.fsencode(source.name(0)) == b"t.tar/\xff\n.png"
    assert len(content_digest(source)) == 64


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_tars_of_the_system(tmp_path, format) -> None:
    for n in range(3):
        (tmp_path / "x" / "in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / "in" / f"{n}.png").write_bytes(png(n))
    command = ["tar", "-C", tmp_path / "x", "--sort=name", f"--format={format}", "-cf", tmp_path / "t.tar", "in"]
    subprocess.run(command, check=True)
    source = open_source(tmp_path / "t.tar")
    assert names(source) == [f"t.tar/in/{n}.png" for n in range(3)]
    assert values(source) == [0, 1, 2]


def test_what_pax_records_say_counts(tmp_path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}) as tar:
        about = tarfile.TarInfo("a.png")
        about.size, about.pax_headers = len(png(3)), {"path": "b.png", "mtime": "1.5"}
        tar.addfile(about, io.BytesIO(png(3)))
    source = open_source(tmp_path / "t.tar")
    assert names(source) == ["t.tar/b.png"]
    assert values(source) == [3]


def test_joined_tars_are_read_to_their_end(tmp_path) -> None:
    one, two = write_shards(tmp_path / "parts", [2, 3])
    (tmp_path / "t.tar").write_bytes(one.read_bytes() + two.read_bytes())
    assert values(open_source(tmp_path / "t.tar")) == list(range(5))
    end = len(one.read_bytes().rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "u.tar").write_bytes(one.read_bytes()[:end])
    with pytest.raises(DataError, match=rf"byte {end}: the tar ends without a mark.*truncate -s {end + 1024}\.$"):
        open_source(tmp_path / "u.tar")
    os.truncate(tmp_path / "u.tar", end + 1024)
    assert values(open_source(tmp_path / "u.tar")) == [0, 1]


def damage(content: bytes, where: int, new: bytes) -> bytes:
    return content[:where] + new + content[where + len(new) :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tar: b"", "is empty: not a tar"),
        (lambda tar: b"no tar at all" * 100, "byte 0: not a tar file"),
        (lambda tar: tar[:2100], r"byte 2048: the tar is truncated, it ends at byte 2100. Fetch or copy it again"),
        (lambda tar: tar[:2048], r"byte 2048: the tar ends without a mark"),
        (lambda tar: tar[:1600], r"byte 1600: the tar ends without a mark"),
        (lambda tar: tar[:1300], r"byte 1024: the tar is truncated"),
        (lambda tar: damage(tar, 1024, b"X"), "byte 1024: a damaged header: its checksum is wrong"),
        (lambda tar: b"\x1f\x8b\x08\0" + tar, "packed with gzip.*gunzip"),
        (lambda tar: b"BZh9" + tar, "packed with bzip2"),
        (lambda tar: b"\xfd7zXZ\0" + tar, "packed with xz"),
        (lambda tar: b"\x28\xb5\x2f\xfd" + tar, "packed with zstd"),
    ],
)
def test_damaged_tars(tmp_path, spoil, message) -> None:
    (path,) = write_shards(tmp_path, [3])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_source(path)


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = name.ljust(100, b"\0") + b"0000644\0" * 3 + size.ljust(12, b"\0") + b"0".ljust(12, b"\0")
    block = (block + b" " * 8 + kind).ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return damage(block, 148, b"%06o\0 " % sum(block))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"a.png", b"", b"S"), "byte 0: a sparse file.*--sparse"),
        (
            header(b"x", b"30", b"x") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + header(b"a.png", b"", b"0"),
            "sparse",
        ),
        (header(b"x", b"77777777777", b"x") + bytes(512), "8,589,934,591 bytes for a name"),
        (header(b"x", b"\x80" + b"\xff" * 11, b"0") + bytes(512), "truncated"),
        (header(b"x", b"\xff" * 12, b"0") + bytes(512), "not a tar file|a number is none"),
        (header(b"x", b"10", b"x") + b"0 a=b\n".ljust(512, b"\0"), "a damaged pax header"),
        (header(b"x", b"10", b"x") + b"99 a=b\n".ljust(512, b"\0"), "a damaged pax header"),
        (header(b"x", b"10", b"x") + b"9999999999999999999999 ".ljust(512, b"\0"), "a damaged pax header"),
        (header(b"x", b"10", b"x") + b"6 ab\n".ljust(512, b"\0"), "a damaged pax header"),
        (header(b"x", b"1000", b"L") + bytes(512), "truncated"),
    ],
)
def test_hostile_headers(tmp_path, content, message) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "t.tar")


def test_any_damage_is_a_data_error(tmp_path) -> None:
    (path,) = write_shards(tmp_path, [4], labels="json")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    opened = 0
    for _ in range(150):
        spoiled = bytearray(whole[: generator.choice([len(whole), generator.integers(1, len(whole))])])
        for place in generator.integers(0, len(spoiled), generator.integers(0, 4)):
            spoiled[place] = generator.integers(0, 256)
        path.write_bytes(spoiled)
        try:
            source = open_source(path)
            opened += all(len(source[i].content) for i in range(len(source)))
        except DataError:
            pass
    assert 0 < opened < 150


# --- the index


def test_the_index_is_made_once_and_again_when_the_tar_changes(tmp_path, own_cache, monkeypatch) -> None:
    paths = write_shards(tmp_path, [3, 2])
    made = []
    whole = tar_index.samples_of
    monkeypatch.setattr(tar_index, "samples_of", lambda *args: made.append(args[2]) or whole(*args))
    assert values(open_source(tmp_path)) == values(open_source(paths)) == list(range(5))
    assert sorted(made) == [str(path) for path in paths]
    assert len(list((own_cache / "tars").glob("*.index"))) == 2
    write_tar(paths[1], {"n.png": png(77)})
    assert values(open_source(tmp_path)) == [0, 1, 2, 77]
    assert made[2:] == [str(paths[1])]
    for index in (own_cache / "tars").glob("*.index"):  # a damaged one is made anew
        index.write_bytes(damage(index.read_bytes(), index.stat().st_size - 3, b"?"))
    assert names(open_source(tmp_path))[3] == "train-000001.tar/n.png"
    assert len(made) == 5
    for index in (own_cache / "tars").glob("*.index"):
        index.write_bytes(index.read_bytes()[:10])
    assert len(open_source(tmp_path)) == 4
    assert not list((own_cache / "tars").glob(".*"))


def test_the_index_is_small_and_comes_back_when_the_cache_is_emptied(tmp_path, own_cache) -> None:
    (path,) = write_shards(tmp_path, [200])
    source = open_source(path)
    (index,) = (own_cache / "tars").glob("*.index")
    assert index.stat().st_size < 200 * 40 + 1024
    assert len(pickle.dumps(source)) < 4000
    index.unlink()
    assert source.name(7) == "train-000000.tar/00007.png"
    assert index.exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    (path,) = write_shards(tmp_path, [1])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot keep the index .* Set NEXTBLOCK_CACHE to a folder"):
        open_source(path)


def test_several_at_once_make_each_index_once(tmp_path, monkeypatch) -> None:
    paths = write_shards(tmp_path, [5] * 4)
    made = []
    whole = tar_index.samples_of
    monkeypatch.setattr(tar_index, "samples_of", lambda *args: made.append(args[2]) or whole(*args))
    threads = [threading.Thread(target=open_source, args=(paths,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [str(path) for path in paths]


def test_fingerprints(tmp_path) -> None:
    paths = write_shards(tmp_path / "here", [3, 2])
    source = open_source(paths)
    before = fingerprint(source)
    assert before.count == 5
    assert before.bytes == sum(path.stat().st_size for path in paths)
    write_manifest(source, tmp_path / "manifest.gz")
    os.rename(tmp_path / "here", tmp_path / "there")
    moved = open_source(tmp_path / "there")
    assert fingerprint(moved) == before
    assert content_digest(moved) == content_digest(source)
    names = [name for name, _ in source.manifest()]
    assert names == sorted(names)
    # another image of the same size, in a tar of the same size
    write_tar(tmp_path / "there" / "train-000001.tar", {"00003.png": png(3), "x.png": png(4), "x.cls": b"0"})
    changed = open_source(tmp_path / "there")
    assert fingerprint(changed).bytes == before.bytes
    assert fingerprint(changed) != before
    assert "1 added: train-000001.tar" in explain_change(tmp_path / "manifest.gz", changed)


def test_same_names_in_other_folders(tmp_path) -> None:
    a, b = write_shards(tmp_path / "a", [1])[0], write_shards(tmp_path / "b", [2])[0]
    assert names(open_source([b, a]))[:2] == ["a/train-000000.tar/00000.png", "b/train-000000.tar/00000.png"]
    assert len(open_source([a, a])) == 1


# --- reading


def test_a_tar_that_changes_in_use_is_an_error(tmp_path) -> None:
    (path,) = write_shards(tmp_path, [3])
    source = open_source(path)
    assert source[0].label == 0
    content = path.read_bytes()
    path.write_bytes(content + bytes(512))
    with pytest.raises(DataError, match="was changed while it was in use"):
        source[1]
    path.unlink()
    write_tar(path, {"a.png": png(5)})
    assert values(open_source(path)) == [5]
    with pytest.raises(DataError, match=r"was changed while it was in use|not the one"):
        pickle.loads(pickle.dumps(source))[1]


def test_hiccups_are_tried_again_and_failures_told(tmp_path, monkeypatch) -> None:
    (path,) = write_shards(tmp_path, [3])
    source = open_source(path)
    monkeypatch.setattr(tar_local, "FIRST_WAIT_S", 0.0)
    true, failures = os.pread, [5, 5, 5]

    def flaky(*args: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return true(*args)

    monkeypatch.setattr(os, "pread", flaky)
    assert source[1].content == png(1)
    failures += [5] * 4
    with pytest.raises(DataError, match=r"read error on .*train-000000.tar: Input/output error.*resume"):
        source[1]
    assert not failures


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tar_local, "OPEN_FILES", 2)
    tar_local._OPEN.clear()
    source = open_source(write_shards(tmp_path, [1] * 6))
    assert values(source) == list(range(6))
    assert values(source) == list(range(6))
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len([link for link in links if link.startswith(str(tmp_path)) and link.endswith(".tar")]) <= 2


def stream_of(spec: object, seed: int = 0) -> TrainingStream:
    return TrainingStream(open_source(spec), seed, CropConfig((4, 4)), Preprocessing((4, 4)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_pure_whatever_workers_and_ranks(tmp_path, monkeypatch, workers) -> None:
    monkeypatch.setattr("nextblock.data.sources.tars.WINDOW_SHARDS", 2)
    paths = write_shards(tmp_path, [4, 7, 3, 5, 1])
    stream = stream_of(paths)
    whole = stream.load(range(60))
    assert sorted(whole.indices[:20].tolist()) == list(range(20))
    assert sorted(whole.indices[20:40].tolist()) == list(range(20))
    assert whole.indices[:20].tolist() != whole.indices[20:40].tolist()
    batches = list(training_batches(stream, [range(0, 60, 2), range(1, 60, 2)], workers=workers))  # two ranks
    for rank, batch in enumerate(batches):
        assert torch.equal(batch.indices, whole.indices[rank::2])
        assert torch.equal(batch.images, whole.images[rank::2])
        assert torch.equal(batch.labels, whole.labels[rank::2])
    assert torch.equal(pickle.loads(pickle.dumps(stream)).load(range(30, 60)).images, whole.images[30:])
    # at most two tars at a time
    tar_of = np.repeat(np.arange(5), [4, 7, 3, 5, 1])[whole.indices[:20].numpy()]
    last = {tar: place for place, tar in enumerate(tar_of.tolist())}
    first = {tar: place for place, tar in reversed(list(enumerate(tar_of.tolist())))}
    assert max(sum(first[tar] <= place <= last[tar] for tar in last) for place in range(20)) <= 2


def test_a_broken_image_is_replaced_and_listed(tmp_path) -> None:
    write_tar(tmp_path / "t.tar", {"a.png": png(1), "b.png": b"broken", "c.png": b""})
    batch = stream_of(tmp_path / "t.tar").load(range(6))
    assert set(batch.indices.tolist()) == {0}
    assert {bad.name for bad in batch.bad} == {"t.tar/b.png", "t.tar/c.png"}
