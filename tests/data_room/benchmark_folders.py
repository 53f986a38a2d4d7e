"""Tiny copies of the benchmark data sets, each in the layout and with the file names that its archive has.

Every image of a class is one gray tone, lighter by `TEST` where it is a test image, so that an image, its label and
its split can be checked against each other after decoding.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

SIDE_PX = 8
TEST = 12
PER_CLASS = {"train": 3, "test": 2}


def tone(number: int, split: str) -> int:
    """The gray of class `number`; what is neither to train nor to test on is black."""
    return {"train": 50 * (number + 1), "test": 50 * (number + 1) + TEST}.get(split, 0)


def image(number: int, split: str, side_px: int = SIDE_PX) -> Image.Image:
    return Image.new("RGB", (side_px, side_px), (tone(number, split),) * 3)


def write(path: Path, number: int, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(number, split).save(path)


def each(classes: int, splits: tuple[str, ...] = ("train", "test")) -> list[tuple[str, int, int]]:
    """(split, class number, image number), split after split."""
    return [(s, c, i) for s in splits for c in range(classes) for i in range(PER_CLASS.get(s, 1))]


def imagenet1k(root: Path) -> None:
    for split, c, i in each(3):
        wnid = ("n01440764", "n01443537", "n02102040")[c]
        name = f"{wnid}_{10026 + i}.JPEG" if split == "train" else f"ILSVRC2012_val_{c:04}{i:04}.JPEG"
        write(root / "imagenet1k" / {"train": "train", "test": "val"}[split] / wnid / name, c, split)


def inat18(root: Path) -> None:
    folder = root / "inat18"
    categories = [
        {"id": c, "name": name, "supercategory": "Aves"} for c, name in enumerate(("Corvus", "Pica", "Parus"))
    ]
    for split, word in (("train", "train"), ("test", "val")):
        images, annotations = [], []
        for _, c, i in each(3, (split,)):
            name, number = f"train_val2018/Aves/{3000 + c}/{split}{i:032x}.jpg", len(images) + 10
            write(folder / name, c, split)
            images.insert(0, {"id": number, "file_name": name, "width": SIDE_PX, "height": SIDE_PX})
            annotations.append({"id": number, "image_id": number, "category_id": c})
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (folder / f"{word}2018.json").write_text(json.dumps(content))


def _py2_pickle(value: Any) -> bytes:
    """As Python 2 wrote protocol 2: texts are byte strings, arrays call numpy.core.multiarray._reconstruct."""
    if isinstance(value, dict):
        return b"}" + b"".join(_py2_pickle(k) + _py2_pickle(v) + b"s" for k, v in value.items())
    if isinstance(value, list):
        return b"]" + b"".join(_py2_pickle(item) + b"a" for item in value)
    if isinstance(value, np.ndarray):
        shape = b"(" + b"".join(_py2_pickle(n) for n in value.shape) + b"t"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return made + b"(K\x01" + shape + dtype + b"\x89" + _py2_pickle(value.tobytes()) + b"tb"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    raw = value if isinstance(value, bytes) else value.encode()
    return b"T" + struct.pack("<i", len(raw)) + raw


def py2_dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x80\x02" + _py2_pickle(value) + b".")


def _planes(split: str, numbers: list[int]) -> np.ndarray:
    """uint8 [N, 3072]: red, green and blue planes."""
    return np.stack([np.asarray(image(c, split, 32)).transpose(2, 0, 1).reshape(-1) for c in numbers])


def cifar10(root: Path) -> None:
    folder = root / "cifar10/cifar-10-batches-py"
    names = ["airplane", "automobile", "bird"]
    for name, split in [(f"data_batch_{k}", "train") for k in range(1, 6)] + [("test_batch", "test")]:
        labels = [c for _, c, _ in each(3, (split,))]
        py2_dump(
            folder / name, {"batch_label": name, "labels": labels, "data": _planes(split, labels), "filenames": []}
        )
    py2_dump(folder / "batches.meta", {"num_cases_per_batch": 9, "label_names": names, "num_vis": 3072})


def cifar100(root: Path) -> None:
    folder = root / "cifar100/cifar-100-python"
    for split in ("train", "test"):
        fine = [c for _, c, _ in each(3, (split,))]
        content = {"filenames": [], "fine_labels": fine, "coarse_labels": [0] * len(fine), "data": _planes(split, fine)}
        py2_dump(folder / split, content)
    py2_dump(folder / "meta", {"fine_label_names": ["apple", "baby", "bear"], "coarse_label_names": ["fish"]})


def food101(root: Path) -> None:
    folder, names = root / "food-101", ("apple_pie", "baby_back_ribs", "baklava")
    for split in ("train", "test"):
        lists = {name: [f"{name}/{split == 'test':d}{i:06}" for i in range(PER_CLASS[split])] for name in names}
        for c, name in enumerate(names):
            for line in lists[name]:
                write(folder / "images" / f"{line}.jpg", c, split)
        _text(folder / f"meta/{split}.txt", [line for name in names for line in lists[name]])
        _text(folder / f"meta/{split}.json", [json.dumps(lists)])
    _text(folder / "meta/classes.txt", list(names))


def dtd(root: Path) -> None:
    folder, names = root / "dtd", ("banded", "blotchy", "braided")
    for word, split in (("train", "train"), ("val", "train"), ("test", "test")):
        lines = [f"{names[c]}/{names[c]}_{word}{i:04}.jpg" for _, c, i in each(3, (split,))]
        for line in lines:
            write(folder / "images" / line, names.index(line.split("/")[0]), split)
        _text(folder / f"labels/{word}1.txt", lines)
        _text(folder / f"labels/{word}2.txt", lines[::-1])


def pets(root: Path) -> None:
    folder, names = root / "oxford-iiit-pet", ("Abyssinian", "american_bulldog", "Bengal")
    for word, split in (("trainval", "train"), ("test", "test")):
        lines = []
        for _, c, i in each(3, (split,)):
            stem = f"{names[c]}_{100 * (split == 'test') + i}"
            write(folder / "images" / f"{stem}.jpg", c, split)
            lines.append(f"{stem} {c + 1} {1 + c % 2} 1")
        _text(folder / f"annotations/{word}.txt", lines)
    _text(folder / "annotations/list.txt", ["#Image CLASS-ID SPECIES BREED ID"])


def cars(root: Path) -> None:
    folder, names = root / "stanford_cars", ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012")
    (folder / "devkit").mkdir(parents=True)
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        kinds = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        rows = np.empty((1, len(each(3, (split,)))), dtype=kinds)
        for k, (_, c, _) in enumerate(each(3, (split,))):
            rows[0, k] = (np.uint16(1), np.uint8(c + 1), f"{k + 1:05}.jpg")
            write(folder / f"cars_{split}" / f"{k + 1:05}.jpg", c, split)
        savemat(folder / path, {"annotations": rows})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([list(names)], dtype=object)})


def iwildcam(root: Path) -> None:
    folder, rows = root / "iwildcam_v2.0", []
    for word, split in (("train", "train"), ("val", "test"), ("test", ""), ("id_val", ""), ("id_test", "")):
        for _, c, i in each(3, (split,)):
            name = f"{word}{c}{i}-21bc-11ea-a13a-137349068a90.jpg"
            write(folder / "train" / name, c, split)
            rows.append({"split": word, "location_remapped": 0, "filename": name, "y": c, "category_id": c * 7})
    _csv(folder / "metadata.csv", rows)
    names = [{"y": c, "category_id": c * 7, "name": name} for c, name in enumerate(("empty", "tayassu pecari", "cuon"))]
    _csv(folder / "categories.csv", [*names, {"y": 99999, "category_id": 1, "name": "unused"}])


def camelyon17(root: Path) -> None:
    folder, rows = root / "camelyon17_v1.0", []
    where = {("0", "0"): "train", ("3", "0"): "train", ("4", "1"): "", ("1", "0"): "test", ("2", "0"): ""}
    for (center, own), split in where.items():
        for _, c, i in each(2, (split,)):
            slide, x, y = f"patient_004_node_{center}", 3328 + c, 21792 + i
            write(folder / f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png", c, split)
            row = {"patient": "004", "node": center, "x_coord": x, "y_coord": y, "tumor": c, "slide": 0}
            rows.append({"": len(rows), **row, "center": center, "split": own})
    _csv(folder / "metadata.csv", rows)


def pcam(root: Path) -> None:
    """The hub's copy; its HDF5 files need a library that we do not."""
    shards(root / "pcam/data", {"train": "train", "valid": "test", "test": ""}, classes=2, named=False)


def rxrx1(root: Path) -> None:
    folder, rows = root / "rxrx1_v1.0", []
    for word, split in (("train", "train"), ("val", "test"), ("test", "")):
        for _, c, i in each(3, (split,)):
            experiment, well = f"HUVEC-{len(word):02}", f"B{c + 2:02}"
            write(folder / f"images/{experiment}/Plate{i + 1}/{well}_s1.png", c, split)
            row = {"dataset": word, "experiment": experiment, "plate": i + 1, "well": well, "site": 1}
            rows.append({**row, "sirna": f"s{21721 + c}", "sirna_id": c})
    _csv(folder / "metadata.csv", rows)


def eurosat(root: Path) -> None:
    """The hub's copy; it has splits that are not asked for."""
    shards(root / "eurosat/data", {"train": "train", "test": "test", "contrast": ""})


def fmow(root: Path) -> None:
    folder, rows = root / "fmow_v1.1", []
    for word, split in (("seq", ""), ("val", "test"), ("train", "train"), ("test", "")):
        for _, c, _ in each(3, (split,)):
            write(folder / f"images/rgb_img_{len(rows)}.png", c, split)
            rows.append({"split": word, "category": ("airport", "barn", "zoo")[c], "country_code": "FRA"})
    _csv(folder / "rgb_metadata.csv", rows)


def infograph(root: Path) -> None:
    folder, names = root / "domainnet", ("aircraft_carrier", "airplane", "The_Eiffel_Tower")
    for split in ("train", "test"):
        lines = []
        for _, c, i in each(3, (split,)):
            name = f"infograph/{names[c]}/infograph_{c + 1:03}_{split == 'test':d}{i:05}.jpg"
            write(folder / name, c, split)
            lines.append(f"{name} {c}")
        _text(folder / f"infograph_{split}.txt", lines)


def shards(
    folder: Path,
    splits: dict[str, str],
    classes: int = 3,
    *,
    named: bool = True,
    columns: tuple[str, str] = ("image", "label"),
    digest: str = "-da7f777dde05cdc6",
) -> None:
    """Parquet files as the hub has them: {name of a split: what it is for}; two files for the one to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    for word, split in splits.items():
        rows = [c for _, c, _ in each(classes, (split,))]
        count = 2 if split == "train" else 1
        for k in range(count):
            encoded = [{"bytes": _png(c, split), "path": None} for c in rows[k::count]]
            table = pa.table({columns[0]: encoded, columns[1]: rows[k::count]})
            label = {"_type": "ClassLabel", "names": [f"class {c}" for c in range(classes)]}
            features = {columns[0]: {"_type": "Image"}, columns[1]: label}
            if named:
                about = json.dumps({"info": {"features": features}})
                table = table.replace_schema_metadata({"huggingface": about})
            pq.write_table(table, folder / f"{word}-{k:05}-of-{count:05}{digest}.parquet")


def split_folders(folder: Path, train: str, test: str, classes: int = 3) -> None:
    for split, c, i in each(classes):
        write(folder / {"train": train, "test": test}[split] / f"class {c}" / f"{i}.png", c, split)


def _png(number: int, split: str) -> bytes:
    out = io.BytesIO()
    image(number, split).save(out, "PNG")
    return out.getvalue()


def _text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path], None]] = {
    write_one.__name__: write_one
    for write_one in (
        imagenet1k, inat18, cifar10, cifar100, food101, dtd, pets, cars, iwildcam, camelyon17, pcam, rxrx1, eurosat,
        fmow, infograph,
    )
}  # fmt: skip
