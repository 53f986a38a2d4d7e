"""What folders of shards share: the sealed JSON file, names and lengths of shards, the list of what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextblock.data.latents.shards import ShardRecord as LatentShard
from nextblock.data.prepared.shards import ShardRecord as PreparedShard
from nextblock.data.shard_folder import (
    fault_of_content,
    fault_of_size,
    read_sealed,
    require_few_bad,
    sealed,
)
from nextblock.durable import sha256_of
from nextblock.errors import DataError

VALUES = {"format": 3, "shards": {1: {"bytes": 10}}, "shape": (2, 3)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "about.json"
    path.write_bytes(sealed(VALUES))
    return path


def read(path: Path, version: int = 3) -> dict[str, Any]:
    with read_sealed(path, ["shards", "shape"], version, "Make it anew.") as values:
        return values


def test_what_is_sealed_is_read(file: Path) -> None:
    assert read(file) == {"format": 3, "shards": {"1": {"bytes": 10}}, "shape": [2, 3]}


def test_a_file_of_before_the_hash_is_read(file: Path) -> None:
    file.write_text(json.dumps({"format": 3, "shards": {}}))
    assert read(file) == {"format": 3, "shards": {}}


def test_no_changed_letter_is_accepted(file: Path) -> None:
    whole = file.read_bytes()
    accepted = []
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read(file)
        except DataError:
            continue
        accepted.append(found)
    assert [found for found in accepted if found != read_of(whole)] == []


def read_of(whole: bytes) -> dict[str, Any]:
    """Letters between values may change: a space that becomes an exclamation mark does not pass, a newline may."""
    values: dict[str, Any] = json.loads(whole)
    values.pop("sha256")
    return values


def test_another_format_says_what_to_do(file: Path) -> None:
    with pytest.raises(DataError, match=r"about.json is of format 3; this version reads 4. Make it anew."):
        read(file, version=4)


def test_what_the_values_lead_to_names_the_file(file: Path) -> None:
    with (
        pytest.raises(DataError, match=r"about\.json cannot be read: KeyError"),
        read_sealed(file, ["shards", "shape"], 3, "") as values,
    ):
        values["lacking"]


@pytest.mark.parametrize("record", [LatentShard, PreparedShard])
@pytest.mark.parametrize("name", ["../shard-00002.bin", "/etc/passwd", "shard-00002.safetensors", 7])
def test_a_shard_has_the_name_of_its_number(record: Any, name: object) -> None:
    with pytest.raises(ValueError, match=r"a shard's file is .* instead of 'shard-00001\."):
        record.from_dict(1, {"file": name, "bad": []})


def test_faults_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    assert fault_of_size(path, 4) == "it cannot be read (no such file or directory)"
    path.write_bytes(b"abcd")
    digest = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"  # printf abcd | sha256sum
    assert fault_of_content(path, 4, digest) is None
    assert fault_of_content(path, 4, sha256_of("abcd")) == "its SHA-256 is not the one recorded when it was written"
    assert fault_of_content(path, 5, digest) == "it is truncated, 4 bytes instead of 5"
    assert fault_of_size(path, 3) == "it is too long, 4 bytes instead of 3"


def test_too_many_broken_images_are_listed(tmp_path: Path) -> None:
    bad = [("a,b\udcff.jpg", "empty", 3), ("c.jpg", "truncated", 9)]
    require_few_bad(tmp_path, bad, 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"2 images cannot be decoded, more than the 1 allowed.*bad_samples.csv"):
        require_few_bad(tmp_path, bad, 1)
    written = (tmp_path / "bad_samples.csv").read_bytes()
    assert written == b'name,reason,position\r\n"a,b\xff.jpg",empty,3\r\nc.jpg,truncated,9\r\n'
