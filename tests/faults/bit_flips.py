"""Random damage to files that were written: one bit flipped, or the end cut off. Each must be noticed before use."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextblock.checkpoints.pretrained import load_pretrained, read_about, save_pretrained
from nextblock.data.latents import open_latents
from nextblock.data.loading import evaluation_batches
from nextblock.data.prepared import open_prepared
from nextblock.data.prepared.pieces import Image, read_images, write_piece
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import NextblockError
from nextblock.evaluation.feature_cache import cached_features
from nextblock.evaluation.features import Features
from nextblock.jobs.cache_latents import cache_latents
from nextblock.jobs.embed_parts import Parts
from nextblock.jobs.prepare import prepare
from nextblock.training.checkpoint import newest_checkpoint, save_checkpoint
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_run import tiny, write_images
from victims import digest_of, write_vae

FLIP, CUT = "flip", "cut"
SAME = "not noticed: the same content"


@dataclass(frozen=True)
class Subject:
    """files: that are damaged, one at a time. use: reads all that anybody would, into a digest, and of JSON all that it
    says; raises when damage is noticed. careful: reads what `use` may leave alone; None where there is nothing such.
    slack: the endings of files some bytes of which mean nothing: white space of JSON, dates in a zip file."""

    files: list[Path]
    use: Callable[[], str]
    careful: Callable[[], object] | None = None
    slack: tuple[str, ...] = (".json",)


@dataclass
class Damaged:
    """tries: by what was done and what came of it. failures: damage that nobody noticed, or not in words."""

    tries: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def damaged_at_random(subject: Subject, count: int, draw: random.Random) -> Damaged:
    """Damage a file of the subject, use it, mend it; so many times."""
    whole, found = subject.use(), Damaged()
    for _ in range(count):
        file = draw.choice(subject.files)
        content = file.read_bytes()
        how = draw.choice((FLIP, FLIP, CUT))
        place = draw.randrange(len(content))
        damaged = bytearray(content)
        if how == CUT:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            came = _judged(subject, whole)
            if file.suffix in subject.slack and came == SAME:
                came = "harmless: it says the same"
        finally:
            file.write_bytes(content)
        found.tries[f"{how}: {came.partition(':')[0]}"] += 1
        if came.partition(":")[0] not in ("noticed", "told by verify", "harmless"):
            found.failures.append(f"{how} at {place} of {len(content)} bytes of {file.name}: {came}")
    assert subject.use() == whole
    return found


def _judged(subject: Subject, whole: str) -> str:
    try:
        used = subject.use()
    except NextblockError:
        return "noticed"
    except Exception as error:
        return f"no error of ours: {type(error).__name__}: {error}"
    if used != whole:
        return "not noticed: other content"
    if subject.careful:
        try:
            subject.careful()
        except NextblockError:
            return "told by verify"
    return SAME


def checkpoints(folder: Path) -> Subject:
    """The newer one of two: damage is noticed, told, and the older one taken."""
    torch.manual_seed(0)
    for step in (4, 8):
        state = {"model": {"w": torch.randn(400)}, "optimizer": {"state": {0: torch.randn(9)}}, "step": step}
        save_checkpoint(folder, step, state, keep=2)
    older = digest_of(newest_checkpoint(folder)[1])

    def use() -> str:
        told: list[str] = []
        path, state = newest_checkpoint(folder, told.append)
        if told:
            assert len(told) == 1
            assert "step-00000008 is damaged" in told[0]
            assert (path.name, state["step"]) == ("step-00000004", 4)
            raise NextblockError(told[0])
        assert digest_of(state) == older
        return digest_of(state)

    newer = folder / "step-00000008"
    return Subject([newer / "state.pt", newer / "checkpoint.json"], use)


def latents(folder: Path) -> Subject:
    """Shards of a latent cache (moments, labels, names), and latents.json."""
    images = write_images(folder / "images", per_class=4)
    write_vae(folder / "vae")
    cache = cache_latents(
        dataset=images, vae=folder / "vae", out=folder / "cache", image_size_px=16, workers=0, quiet=True
    )  # fmt: skip

    def use() -> str:
        found = open_latents(cache)
        every = np.arange(len(found))
        moments = [found.moments(every, [flip] * len(found)) for flip in (False, True)]
        names = [found.name(int(index)) for index in every]
        return digest_of([torch.from_numpy(np.stack(moments)), found.labels.tolist(), names, repr(found.about)])

    return Subject([*sorted(cache.glob("shard-*")), cache / "latents.json"], use, lambda: open_latents(cache).verify())


def prepared(folder: Path) -> Subject:
    """Shards and index of prepared images (contents, labels, names), and prepared.json."""
    made = prepare(
        data=write_images(folder / "images", per_class=4), out=folder / "made", format="png", workers=0, quiet=True
    )  # fmt: skip

    def use() -> str:
        found = open_prepared(made)
        contents = [found[index].content for index in range(len(found))]
        names = [found.name(index) for index in range(len(found))]
        return digest_of([contents, names, found.labels().tolist(), repr(found.about)])

    files = [*sorted(made.glob("shard-*")), made / "index.bin", made / "prepared.json"]
    return Subject(files, use, lambda: open_prepared(made).verify())


def pieces(folder: Path) -> Subject:
    """Pieces of images on their way to shards: contents, and what is known of them."""
    images = [Image(i, f"{i}.png", i % 3 - 1, bytes(range(i, i + 9)), "png", 50 + i) for i in range(6)]
    write_piece(folder, range(1024), [*images, BadSample("6.png", "the file is empty", 6)])
    write_piece(folder, range(1024, 1030), [image._replace(position=1024 + image.position) for image in images])
    whole = {file: file.read_bytes() for file in sorted((folder / ".pieces").iterdir())}

    def use() -> str:
        try:
            return repr(list(read_images(folder, 1030, 0)))
        finally:
            for file, content in whole.items():
                if not file.exists():  # what is known of damaged contents is removed
                    file.write_bytes(content)

    return Subject(list(whole), use)


def parts(folder: Path) -> Subject:
    """Parts of embedded images on their way to one file."""
    source: Any = range(40)  # only its length is asked for
    made = Parts(folder / "out.npz", source, batch_size=2)

    def batches(indices: Sequence[int]) -> Iterator[Features]:
        for start in range(0, len(indices), 2):
            some = np.array(indices[start : start + 2])
            bad = [BadSample("1.png", "the file is empty", 1)] if 1 in some else []
            some = some[some != 1]
            yield Features(np.sin(some[:, None] + np.arange(8.0)).astype(np.float32), some % 3, some, bad)

    made.folder.mkdir()
    made.make(made.lacking(), batches, "")

    def use() -> str:
        found = list(made.read())
        return repr([[each.values.tolist(), each.labels.tolist(), each.indices.tolist(), each.bad] for each in found])

    return Subject(sorted(made.folder.iterdir()), use, slack=(".npz",))


def exported(folder: Path) -> Subject:
    """Exported weights, and what is said of them and of their images."""
    torch.manual_seed(0)
    weights = folder / "exported"
    model = Classifier(XTRAConfig(**tiny()["model"]), HeadConfig("linear", LayerMean(1, 2)), ("cat", "dog"))
    save_pretrained(weights, model, Preprocessing((16, 16)).to_dict(), None, {"origin": "a lake"})

    def use() -> str:
        model, preprocessing = load_pretrained(weights)
        return digest_of([model.state_dict(), repr(Preprocessing.from_dict(preprocessing)), read_about(weights)])

    return Subject([weights / name for name in ("model.safetensors", "config.json", "preprocessor_config.json")], use)


def features(folder: Path) -> Subject:
    """Kept features of a probe: damaged ones are computed anew, to the same."""
    torch.manual_seed(0)
    encoder = XTRA(XTRAConfig(**tiny()["model"])).encoder.eval()
    (write_images(folder / "images", per_class=4) / "top" / "broken.png").write_bytes(b"no image")
    source, preprocessing = open_source(folder / "images"), Preprocessing((16, 16), resize_px=16)
    wanted = {LayerMean(1, 2): True, LayerMean(2, 2): False}
    first: list[str] = []

    def use() -> str:
        anew: list[bool] = []

        def batches() -> Iterator[Batch]:
            anew.append(True)
            return evaluation_batches(source, preprocessing, batch_size=4)

        found = cached_features(encoder, source, preprocessing, wanted, batches, folder=folder / "cache")
        values = [torch.from_numpy(np.array(found.values[layers])) for layers in wanted]
        used = digest_of([values, found.labels.tolist(), found.indices.tolist(), found.bad])
        assert used in (first or [used])
        first.append(used)
        if anew and len(first) > 1:
            raise NextblockError("features were computed anew")
        return used

    use()
    return Subject(sorted((folder / "cache" / "features").glob("*/*")), use)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "checkpoints": checkpoints,
    "latent shards": latents,
    "prepared shards": prepared,
    "prepared pieces": pieces,
    "embedded parts": parts,
    "exported weights": exported,
    "kept features": features,
}
