"""How fast do training images arrive on one core? Files to 256 px random crops, ours against the plain way.

    python -m benchmarks.data_pipeline [--data FOLDER] [--quick]

Plain is what a paper's code does: Pillow decodes at full size, random resized crop (bicubic), flip, float, per-sample
normalisation, torch's DataLoader and its collation. Ours hands over uint8 and mirrors and normalises on the device. The
limit is reading and decoding alone, by the fastest decoder there is, at the scales that ours decodes at. The second row
is ours from shards that `nextblock prepare` made before. All run in one process on one thread, in turn, and processor
time is counted, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Row, Target, Timings, run_alone
from nextblock.data.augment import CROP_UNIFORMS, CropConfig, crop_box
from nextblock.data.decode import orientation_of
from nextblock.data.decoders import PILLOW, PILLOW_SCALED, SIMPLEJPEG, _buffer, chosen_decoder, dct_scale
from nextblock.data.jpeg_header import plain_header
from nextblock.data.loading import training_batches
from nextblock.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, normalize
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import TrainingStream, locate
from nextblock.jobs.prepare import prepare
from nextblock.randomness import uniforms

DATA = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"
SIZE_PX, BATCH = 256, 32
SHARDS = {"shards": "jpeg", "raw": "raw"}  # arms, and how nextblock prepare keeps their images
SHORT_SIDE_PX, QUALITY = 320, 90


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Files to normalised float crops, one by one."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.rglob("*") if file.is_file())
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self.files[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        top, left, h, w = self.box(*image.size[::-1])
        image = image.crop((left, top, left + w, top + h)).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (x - self.mean) / self.std, 0

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * float(torch.empty(1).uniform_(0.3, 1.0))
            ratio = math.exp(float(torch.empty(1).uniform_(math.log(0.75), math.log(1.5))))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(torch.randint(0, height - h + 1, (1,))), int(torch.randint(0, width - w + 1, (1,))), h, w
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side, side


def plain(folder: Path) -> Callable[[int], None]:
    images = PlainImages(folder)
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)

    def run(start: int) -> None:
        for _ in islice(loader, images_a_round(len(images)) // BATCH):
            pass

    return run


def images_a_round(available: int) -> int:
    return min(4, available // BATCH) * BATCH


def ours(source: Source, decoder: str, on_host: bool = False) -> Callable[[int], None]:
    """`on_host`: mirrored and normalised here, too, in batches."""
    preprocessing = Preprocessing((SIZE_PX, SIZE_PX))
    stream = TrainingStream(source, 0, CropConfig((SIZE_PX, SIZE_PX)), preprocessing, decoder=decoder)

    def run(start: int) -> None:
        plan = [list(range(at, at + BATCH)) for at in range(start, start + images_a_round(len(source)), BATCH)]
        for batch in training_batches(stream, plan, workers=0):
            if on_host:
                normalize(batch.images, batch.flip, preprocessing)

    return run


class DecodeOnly:
    """The files that `ours` reads at the same positions, decoded at the same scales; nothing else is done."""

    def __init__(self, source: Source, decoder: str) -> None:
        self.source, self.decoder = source, decoder

    def scales(self, start: int, images: int) -> list[tuple[int, int]]:
        """Index and scale of each, looked up beforehand: that is not counted."""
        crop, where, found = CropConfig((SIZE_PX, SIZE_PX)), np.arange(start, start + images), []
        draws = uniforms(0, "crop", where, CROP_UNIFORMS)
        for index, u in zip(locate(0, where, len(self.source))[1].tolist(), draws, strict=True):
            image = Image.open(io.BytesIO(self.source[index].content))
            width, height = image.size[::-1] if orientation_of(image) > 4 else image.size
            found.append((index, dct_scale(crop_box(height, width, crop, u), crop.size_px)))
        return found

    def run(self, chosen: list[tuple[int, int]]) -> None:
        for index, scale in chosen:
            decode_at(self.source[index].content, scale, self.decoder)


def decode_at(content: Any, scale: int, decoder: str) -> None:
    if decoder == SIMPLEJPEG:
        import simplejpeg

        header = plain_header(content)  # as ours does, the quickest there is
        height, width = header[:2] if header else simplejpeg.decode_jpeg_header(content)[:2]
        sides = -(-height // scale), -(-width // scale)
        try:
            simplejpeg.decode_jpeg(
                content, "RGB", min_height=sides[0], min_width=sides[1], min_factor=scale,
                buffer=_buffer(3 * sides[0] * sides[1]),
            )  # fmt: skip
            return
        except ValueError:
            pass
    image = Image.open(io.BytesIO(content))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()


def planned(device: str) -> list[Row]:
    """The rows, not measured; they are the CPU's."""
    targets = (Target("plain", ">=", 2.0), Target("limit", ">=", 0.75))
    files = Row(f"image pipeline, {SIZE_PX} px random crops, one core", "images/s", "cpu", targets)
    shards = Row("the same from prepared shards", "images/s", "cpu", (Target("plain", ">=", 4.0),))
    return [files, shards] if device == "cpu" else []


def rows(device: str, quick: bool = False, data: Path = DATA) -> list[Row]:
    """Measure them; `quick`: one round. Without the images nothing is measured."""
    found = planned(device)
    if not found or not data.is_dir():
        return found
    source, fastest = open_source(str(data)), chosen_decoder()
    limit = DecodeOnly(source, fastest)
    arms = {"ours": ours(source, fastest), "plain": plain(data), "normalised": ours(source, fastest, on_host=True)}
    arms |= {decoder: ours(source, decoder) for decoder in (PILLOW_SCALED, PILLOW) if decoder != fastest}
    with tempfile.TemporaryDirectory() as folder, one_thread():
        arms |= {arm: ours(prepared(data, Path(folder) / arm, kind), fastest) for arm, kind in SHARDS.items()}
        seconds = processor_seconds(arms, limit, 1 if quick else 9, images_a_round(len(source)))
    images = images_a_round(len(source))
    return [of_files(found[0], seconds, images, fastest), of_shards(found[1], seconds, images, fastest)]


def prepared(data: Path, out: Path, kind: Any) -> Source:
    prepare(
        data=str(data), out=out, short_side=SHORT_SIDE_PX, quality=QUALITY, format=kind, max_bad_fraction=1.0,
        workers=0, quiet=True,
    )  # fmt: skip
    return open_source(str(out))


def of_files(row: Row, seconds: dict[str, list[float]], images: int, decoder: str) -> Row:
    arms = {name: seconds[name] for name in ("ours", "plain", "limit")}
    others = {name: against_plain(seconds, name) for name in (PILLOW, PILLOW_SCALED) if name in seconds}
    note = f"decoder {decoder}; the limit reads and decodes whole images, ours stops below the crop; mirroring and "
    note += "normalising are left to the device; × plain with both on the same core"
    note += f" {against_plain(seconds, 'normalised'):.2f}" + "".join(
        f", with decoder {n} {x:.2f}" for n, x in others.items()
    )
    return replace(Timings(arms).row(row, dict.fromkeys(arms, images)), note=note)


def of_shards(row: Row, seconds: dict[str, list[float]], images: int, decoder: str) -> Row:
    arms = {"ours": seconds["shards"], "plain": seconds["plain"]}
    note = (
        f"decoder {decoder}; shorter side {SHORT_SIDE_PX} px, JPEG quality {QUALITY}, only the crop is decoded; "
        f"plain reads the original files; × plain as raw pixels {against_plain(seconds, 'raw'):.2f}"
    )
    return replace(Timings(arms).row(row, dict.fromkeys(arms, images)), note=note)


def against_plain(seconds: dict[str, list[float]], arm: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds[arm], strict=True))


def processor_seconds(
    arms: dict[str, Callable[[int], None]], limit: DecodeOnly, rounds: int, images: int
) -> dict[str, list[float]]:
    """Of every arm and the limit in every round, each beginning with another; a first one, to warm up, is left out."""
    names = [*arms, "limit"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        start, first = turn * images, turn % len(names)
        chosen = limit.scales(start, images)
        for name in names[first:] + names[:first]:
            before = time.process_time()
            limit.run(chosen) if name == "limit" else arms[name](start)
            if turn:
                seconds[name].append(time.process_time() - before)
    return seconds


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    run_alone(__doc__, rows, data=DATA)
