"""Which entity makes the better generator, and which context? xAR on small digits, same model, same images seen.

    python benchmarks/entities.py --out runs/entities [--seeds 0 1 2] [--epochs 20] [--arms cells4 whole ...]

scikit-learn's digits (8×8 px) with a patch for every pixel, so a grid of 8×8: patches, cells of 2×2 and 4×4,
subsamples of 4×4, scales 1-2-4-8 and the whole image, all with noisy context; then cells of 4×4 with the other three
contexts. Every arm is the same transformer (0.33 million parameters by default; scales have 21 more positions), sees
the same images in the same order, and is sampled without guidance. A doubled sequence (clean context) costs twice the
time, scales a third more.

Measured on 720 samples, with the features of one encoder (XTRA, trained on scattered digits, recipe xtra_digits, seed
0), each digit drawn 16 px wide in the middle of its canvas: the Fréchet distance to the 1,437 training digits and KID;
and how often a classifier of real digits (support vectors) reads what was asked for. Floor: one half of the real
digits against the other. It is not FID: another feature space, another number of images.

Finished runs and samples are kept: run it again to go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.svm import SVC

from nextblock.data.digits import on_canvas, plain_digits, scattered_digits
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import denormalize
from nextblock.data.sources import open_source
from nextblock.evaluation.features import extract
from nextblock.evaluation.generation import compare, real_against_real
from nextblock.figures.samples import contact_sheet
from nextblock.figures.seeds import draw_seeds, interval
from nextblock.jobs.opening import open_model
from nextblock.jobs.opening_generator import open_generator
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.train_generator import train_generator
from nextblock.training.launch import pick_device
from nextblock.xar.sampler import sample_latents

PX = 8
DRAWN_PX = 16
SAMPLES = 720
BATCH = 360
CELLS = {"ordering": "cells", "entity_size": 4}
ARMS: dict[str, dict[str, Any]] = {
    "patches": {"ordering": "patches"},
    "cells2": {"ordering": "cells", "entity_size": 2},
    "cells4": CELLS,
    "subsamples4": {"ordering": "subsamples", "entity_size": 4},
    "scales": {"ordering": "scales"},
    "whole": {"ordering": "whole"},
    "cells4, clean": CELLS | {"context": "clean"},
    "cells4, increasing": CELLS | {"context": "increasing"},
    "cells4, decreasing": CELLS | {"context": "decreasing"},
}
ENTITIES, CONTEXTS = list(ARMS)[:6], ["cells4", *list(ARMS)[6:]]
RESULTS = Path(__file__).parent / "results"
Images = NDArray[np.uint8]


def require_same_options(options: argparse.Namespace) -> None:
    """A folder holds runs of one size and length; others need another --out."""
    mine = {name: getattr(options, name) for name in ("epochs", "width", "depth", "steps")}
    file = Path(options.out) / "options.json"
    if file.is_file() and json.loads(file.read_text()) != mine:
        raise SystemExit(f"{options.out} was started with {file.read_text()}; take another --out for {mine}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine))


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(options.out) / f"{arm.replace(', ', '-')}-seed{seed}"


def train_arm(options: argparse.Namespace, arm: str, seed: int) -> None:
    folder, (train, _) = run_folder(options, arm, seed), plain_digits(PX)
    data = {"train": (train.images, train.labels), "workers": 0}
    if (folder / "exported").is_dir():
        return
    if (folder / "config.yaml").is_file():
        done = train_generator(resume=folder, data=data, quiet=options.quiet)
    else:
        sizes = {"latent_size": PX, "patch_size": 1, "width": options.width, "depth": options.depth,
                 "num_heads": options.width // 32}  # fmt: skip
        training = {
            "epochs": options.epochs, "batch_size": 32, "lr": 3e-3, "lr_at_batch": 32, "seed": seed,
            "device": options.device, "ema_decay": 0.998, "decay_from": 0.3,
        }  # fmt: skip
        done = train_generator(
            config="xar_digits", data=data, model=sizes | ARMS[arm], training=training, watch={"pictures": 0},
            out=folder, quiet=options.quiet,
        )  # fmt: skip
    if done is None or not done.finished:
        raise KeyboardInterrupt  # a half-trained generator is not to be judged


def samples_of(options: argparse.Namespace, arm: str, seed: int) -> Images:
    """uint8 [720, 8, 8, 1], ten classes in turn; kept beside the run."""
    file = run_folder(options, arm, seed) / "samples.npz"
    if not file.is_file():
        opened = open_generator(run_folder(options, arm, seed), device=options.device)
        made = []
        for start in range(0, SAMPLES, BATCH):
            numbers = torch.arange(start, start + BATCH)
            made.append(
                sample_latents(
                    opened.model, numbers % 10, steps=options.steps, solver="multistep", seed=seed, indices=numbers
                )
            )
        np.savez(file, arr_0=denormalize(torch.cat(made), opened.preprocessing).cpu().numpy())
    return np.load(file)["arr_0"]


class Judge:
    """The fixed feature space and the classifier of real digits."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder = Path(options.out) / "encoder"
        if not (folder / "exported").is_dir():
            train, _ = scattered_digits(0, 5)
            pretrain(
                config="xtra_digits", data={"train": (train.images, train.labels), "workers": 0}, out=folder,
                training={"seed": 0}, quiet=options.quiet,
            )  # fmt: skip
        self.encoder = open_model(folder, device="cpu")
        self.real, held_out = plain_digits(PX)
        flat = self.real.images.reshape(len(self.real.images), -1) / 255
        self.reader = SVC(C=10).fit(flat, self.real.labels)
        self.read_right = float(
            (self.reader.predict(held_out.images.reshape(-1, PX * PX) / 255) == held_out.labels).mean()
        )
        self.reference = self.features(self.real.images[..., None])
        self.floor = real_against_real(self.reference, metrics=("frechet", "kid"))

    def features(self, images: Images) -> NDArray[np.float64]:
        """[N, 8, 8, 1] digits, each drawn in the middle of a canvas -> [N, D]."""
        drawn = [Image.fromarray(i).resize((DRAWN_PX, DRAWN_PX), Image.Resampling.BICUBIC) for i in images[..., 0]]
        canvases = on_canvas(np.stack([np.asarray(each) for each in drawn]))
        preprocessing = self.encoder.preprocessing
        batches = evaluation_batches(open_source(canvases), preprocessing, batch_size=256)
        found = extract(self.encoder.model.encoder, batches, preprocessing)
        return found.values.astype(np.float64)

    def of(self, images: Images) -> dict[str, float]:
        found = compare(self.features(images), self.reference, metrics=("frechet", "kid"))
        asked = np.arange(len(images)) % 10
        read = self.reader.predict(images.reshape(len(images), -1) / 255)
        return {
            "frechet": round(found["frechet"], 6),
            "kid": round(found["kid"], 8),
            "read": round(100 * float((read == asked).mean()), 2),
        }


def separated(one: list[float], other: list[float]) -> bool:
    """Whether the 95 % intervals over seeds do not overlap."""
    (_, low, high), (_, other_low, other_high) = interval(one), interval(other)
    return low > other_high or other_low > high


def told(values: list[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def report(options: argparse.Namespace, judge: Judge, arms: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table, the JSON, the pictures."""
    table = Table("arm", "Fréchet × 1000", "KID × 1000", "read as asked %", "seeds")
    values = {
        arm: {kind: [seed[kind] for seed in seeds.values()] for kind in ("frechet", "kid", "read")}
        for arm, seeds in arms.items()
    }
    for arm, found in values.items():
        thousands = [told([1000 * number for number in found[kind]]) for kind in ("frechet", "kid")]
        table.add_row(arm, *thousands, told(found["read"]), str(len(found["read"])))
    assert judge.floor is not None
    floor = {kind: judge.floor[kind] for kind in ("frechet", "kid")}
    read_right = f"{100 * judge.read_right:.2f}"
    table.add_row("real against real", f"{1000 * floor['frechet']:.3f}", f"{1000 * floor['kid']:.3f}", read_right, "")
    Console(width=120).print(table)
    for group in (ENTITIES, CONTEXTS):
        for one, other in itertools.combinations([a for a in group if len(values.get(a, {}).get("read", ())) > 1], 2):
            verdict = "separated" if separated(values[one]["frechet"], values[other]["frechet"]) else "not separated"
            print(f"Fréchet: {one} and {other} {verdict} (95 % intervals over seeds)")
    panels = {"frechet": "Fréchet distance × 1000, encoder features", "read": "read as asked (%)"}
    drawn = {arm: found | {"frechet": [1000 * f for f in found["frechet"]]} for arm, found in values.items()}
    drawn["real digits"] = {"frechet": [1000 * floor["frechet"]], "read": [100 * judge.read_right]}
    draw_seeds(drawn, Path(options.out) / "entities.png", title="Generated digits, 720 samples a seed", panels=panels)
    sheet(options, list(values))
    about = {name: getattr(options, name) for name in ("epochs", "width", "depth", "steps")}
    about |= {"samples": SAMPLES, "torch": torch.__version__, "threads": torch.get_num_threads()}
    results = about | {"device": options.device_name, "floor": judge.floor, "reader_held_out": judge.read_right}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"entities-{options.device_name}.json"
    file.write_text(json.dumps(results | {"arms": arms}, indent=2) + "\n")
    print(file)


def sheet(options: argparse.Namespace, arms: list[str]) -> None:
    """The first ten samples of every arm, seed 0: one row each."""
    first = options.seeds[0]
    rows = [(arm, samples_of(options, arm, first)[:10]) for arm in arms if run_folder(options, arm, first).is_dir()]
    images = np.concatenate([images for _, images in rows])
    titles = [arm.removeprefix("cells4, ") if i == 0 else "" for arm, _ in rows for i in range(10)]
    contact_sheet(images, titles, Path(options.out) / "samples.png", columns=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/entities")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="solver steps for each entity")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    options.device_name = "cuda" if pick_device(options.device) == "cuda" else "cpu"
    require_same_options(options)
    judge = Judge(options)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for seed, arm in itertools.product(options.seeds, options.arms):
        train_arm(options, arm, seed)
        found.setdefault(arm, {})[str(seed)] = judge.of(samples_of(options, arm, seed))
        print(arm, seed, found[arm][str(seed)], flush=True)
    report(options, judge, found)


if __name__ == "__main__":
    main()
