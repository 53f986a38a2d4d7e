"""Damaged images are an image or a SampleError, the same one each time, in bounded time and memory; nothing else.

`python -m tests.faults.images` does the same with 10,000.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from faults import images
from faults.base_images import base_images
from faults.mutations import mutated

from nextblock.data.decode import decode
from nextblock.errors import SampleError


def test_damaged_images_in_a_process_of_their_own(tmp_path: Path) -> None:
    found = images.run(0, 300, tmp_path)
    assert [one["number"] for one in found] == list(range(300))
    assert [one for one in found if one["wrong"]] == []
    verdicts = Counter(one["verdict"] == ["valid"] for one in found)
    assert min(verdicts[True], verdicts[False]) > 60  # of both there are enough to mean something
    assert max(one["peak_mb"] for one in found) < 4096
    report = images.summary(found, 0)
    assert report["images"] == 300
    assert sum(sum(counts.values()) for counts in report["verdicts"].values()) == 300


def test_what_is_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that raises, one that changes its mind, and one that differs from the others."""
    said = iter(range(1000))
    monkeypatch.setattr(images, "decoders", lambda: ["whole", "pillow"])
    monkeypatch.setattr(images, "verdict", lambda content, decoder: (f"reason {next(said)}", 0))
    wrong = images.judged(0, 1)["wrong"]
    assert "whole gives another result the second time" in wrong
    assert any("decoders differ" in one for one in wrong)

    def broken(content: bytes, decoder: str) -> tuple[str, int]:
        raise KeyError("a bug")

    monkeypatch.setattr(images, "verdict", broken)
    assert images.judged(0, 1)["wrong"][0] == "whole raised KeyError: 'a bug'"


def test_a_process_that_crashes_is_counted_and_the_next_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NEXTBLOCK_CRASH_AT", "2")
    found = images.run(0, 4, tmp_path)
    assert [bool(one["wrong"]) for one in found] == [False, False, True, False]
    assert "the process ended with -11: Fatal Python error: Segmentation fault" in found[2]["wrong"][0]


def test_mutations_are_a_function_of_seed_and_number() -> None:
    for number in range(20):
        assert mutated(3, number) == mutated(3, number)
    assert len({mutated(seed, number).content for seed in (0, 1) for number in range(50)}) > 95
    assert {mutated(0, number).base for number in range(2000)} == set(base_images())


@pytest.mark.parametrize("name", base_images())
def test_what_is_mutated_is_whole(name: str) -> None:
    pixels = decode(base_images()[name], name)
    assert pixels.std() > 20


def test_a_verdict_names_its_pixels() -> None:
    content = base_images()["png rgb"]
    assert images.verdict(content, "whole")[1] == 90 * 121
    assert images.verdict(content, "pillow") != images.verdict(base_images()["png alpha"], "pillow")
    with pytest.raises(SampleError):
        decode(b"", "x")
    assert images.verdict(b"", "pillow") == ("the file is empty", 0)
