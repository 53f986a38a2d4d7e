"""Do larger entities learn better features? Cells of 1×1 (as in AIM), 2×2 and 4×4 patches, same encoder, same compute.

    python benchmarks/granularity.py --data CIFAR10_FOLDER --out runs/granularity [--seeds 0 1 2] [--epochs 2]

Every arm pre-trains the same encoder on the same images; only the cell differs, and with it the predictor's pixel head
(same hidden width, hence the same cost a token). XTRA leaves the last cell out of the sequence, so larger cells cost
less an image; their arm runs so many more steps that every arm pushes as many tokens through its encoder. Then a
linear and an attentive probe are trained on the frozen encoders, beside random weights and raw pixels.

Probes see 2,000 training images of each class (a fixed choice by seed) and all test images. Finished runs and probes
are kept: run it again to go on. --arms also takes `random` and the variations of `arms()`. On a GPU: --epochs 100
--width 384 --depth 12 --device cuda.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nextblock import XTRA
from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.labelled import open_labelled
from nextblock.data.loading import evaluation_batches
from nextblock.data.selection import few_shot
from nextblock.data.sources import Source
from nextblock.data.sources.views import known_labels
from nextblock.evaluation.features import Features, pixel_features
from nextblock.evaluation.linear import linear_accuracy
from nextblock.figures.curves import draw_curves
from nextblock.figures.seeds import draw_seeds, interval
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.probe import probe
from nextblock.jobs.suite import Suite
from nextblock.recipes.config import merge, read_recipe, typed
from nextblock.training.launch import pick_device

TOKENS = 64  # 32 px in patches of 4 px
CELLS = (1, 2, 4)
RECIPE = "xtra_cifar10"
RANDOM = "random"
LRS = [5e-4, 1e-3, 2e-3, 4e-3, 1e-2]
RESULTS = Path(__file__).parent / "results"


def sizes(cell: int, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "cell_size": cell, "width": options.width, "depth": options.depth, "num_heads": options.width // 32,
        "projection_hidden": 2 * options.width, "predictor_width": 96, "predictor_depth": 2, "predictor_heads": 3,
        "head_hidden": 256,
    }  # fmt: skip


def arms(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Arm -> sections over those of the recipe: what is compared, then variations to explain it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in CELLS:
        base = {"model": sizes(cell, options), "training": {"epochs": epochs(cell, options)}}
        found[f"cell{cell}"] = base
        found[f"cell{cell}-raw_targets"] = base | {"model": base["model"] | {"normalize_targets": False}}
        found[f"cell{cell}-crops_from_0.08"] = base | {"data": {"crop_scale": (0.08, 1.0)}}
        found[f"cell{cell}-wide_predictor"] = base | {"model": base["model"] | {"predictor_width": 192}}
        found[f"cell{cell}-long"] = base | {"training": {"epochs": 4 * epochs(cell, options)}}
    return found


def epochs(cell: int, options: argparse.Namespace) -> float:
    """So many that every arm runs the encoder over as many tokens as next-patch prediction does."""
    return round(options.epochs * (TOKENS - 1) / (TOKENS - cell**2), 3)


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(options.out) / f"{arm}-seed{seed}"


def pretrain_arm(options: argparse.Namespace, arm: str, seed: int) -> None:
    folder = run_folder(options, arm, seed)
    if (folder / "exported").is_dir():
        return
    if (folder / "config.yaml").is_file():
        pretrain(resume=folder, quiet=options.quiet)
        return
    given = arms(options)[arm]
    pretrain(
        config=RECIPE,
        data={"train": options.data, "workers": 0, **given.get("data", {})},
        model=given["model"],
        training={"seed": seed, "device": options.device, "warmup_epochs": 0.2, **given["training"]},
        watch={"pictures": 4},
        out=folder,
        quiet=options.quiet,
    )


def random_arm(options: argparse.Namespace, seed: int) -> None:
    """The encoder of 2×2 cells as it is before any training."""
    folder = run_folder(options, RANDOM, seed)
    if folder.is_dir():
        return
    config = typed(merge(read_recipe(RECIPE), {"model": sizes(2, options)}))
    torch.manual_seed(seed)
    save_pretrained(folder, XTRA(config.model), config.data.preprocessing(config.model).to_dict(), "random weights\n")


def probe_arm(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Linear and attentive accuracy of a frozen encoder, chosen on held-out training images."""
    out = Path(options.out) / "probes" / f"{arm}-seed{seed}"
    cache = Path(options.out) / "cache" / f"{arm}-seed{seed}"
    settings = {
        "epochs": options.probe_epochs, "lrs": LRS, "few_shot": options.per_class, "workers": 0, "augment": "none",
        "attentive_layers": [options.depth], "seed": seed, "device": options.device, "cache": str(cache),
    }  # fmt: skip
    if (out / "config.yaml").is_file():
        found = probe(resume=out, quiet=options.quiet)
    else:
        found = probe(
            run=run_folder(options, arm, seed), dataset=options.data, out=out, quiet=options.quiet, probe=settings
        )
    shutil.rmtree(cache, ignore_errors=True)
    if isinstance(found, Suite) or not found.finished:
        raise KeyboardInterrupt
    return {row["kind"]: row["test_top1"] for row in found.rows}


def raw_pixels(options: argparse.Namespace) -> float:
    """A linear classifier on the pixels themselves, with as many images of each class."""
    data = open_labelled(options.data)
    config = typed(read_recipe(RECIPE))
    preprocessing = config.data.preprocessing(config.model)
    rows = few_shot(known_labels(data.train), options.per_class, 0).tolist()

    def features(source: Source, indices: list[int] | None) -> Features:
        return pixel_features(evaluation_batches(source, preprocessing, batch_size=500, indices=indices), preprocessing)

    return linear_accuracy(features(data.train, rows), features(data.test, None)).accuracy


def separated(one: list[float], other: list[float]) -> bool:
    """Whether the 95 % intervals over seeds do not overlap."""
    (_, low, high), (_, other_low, other_high) = interval(one), interval(other)
    return low > other_high or other_low > high


def report(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """The table, the JSON, the pictures."""
    table = Table("arm", "linear %", "attentive %", "seeds")
    for arm, found in results["arms"].items():
        cells = []
        for kind in ("linear", "attentive"):
            values = list(found.get(kind, {}).values())
            mean, low, high = interval(values) if values else (float("nan"),) * 3
            cells.append(f"{mean:.2f}" + (f" ({low:.2f} to {high:.2f})" if len(values) > 1 else ""))
        table.add_row(arm, *cells, str(len(found.get("linear", {}))))
    Console(width=110).print(table)
    for kind in ("linear", "attentive"):
        values = {arm: list(found.get(kind, {}).values()) for arm, found in results["arms"].items()}
        for one, other in itertools.combinations([a for a in values if a in [f"cell{c}" for c in CELLS]], 2):
            if min(len(values[one]), len(values[other])) > 1:
                told = "separated" if separated(values[one], values[other]) else "not separated"
                print(f"{kind}: {one} and {other} {told} (95 % intervals over seeds)")
    drawn = {
        arm: {kind: list(found.get(kind, {}).values()) for kind in ("linear", "attentive")}
        for arm, found in results["arms"].items()
    }
    title = "CIFAR-10, frozen encoders: accuracy on 10,000 test images"
    draw_seeds(drawn, Path(options.out) / "granularity.png", title=title, baseline=RANDOM)
    curves = {f"{arm}, seed 0": run_folder(options, arm, 0) / "metrics.csv" for arm in [f"cell{c}" for c in CELLS]}
    if all(file.is_file() for file in curves.values()):
        draw_curves(curves, Path(options.out) / "pretraining.png")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"granularity-{options.device_name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(RESULTS / f"granularity-{options.device_name}.json")


def load(options: argparse.Namespace) -> dict[str, Any]:
    """What has been measured: every finished probe in the folder."""
    found: dict[str, Any] = {}
    names = [*arms(options), RANDOM]
    for arm in names:
        for file in sorted((Path(options.out) / "probes").glob(f"{arm}-seed*/result.json")):
            seed = file.parent.name.removeprefix(f"{arm}-seed")
            for row in json.loads(file.read_text())["rows"]:
                found.setdefault(arm, {}).setdefault(row["kind"], {})[seed] = row["test_top1"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/granularity")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[f"cell{cell}" for cell in CELLS])
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--per_class", type=int, default=2000, help="probe training images of each class")
    parser.add_argument("--probe_epochs", type=float, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stage", choices=["all", "pretrain", "probe", "report"], default="all")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()
    options.device_name = "cuda" if pick_device(options.device) == "cuda" else "cpu"
    for seed, arm in itertools.product(options.seeds, options.arms):
        if options.stage in ("all", "pretrain") and arm != RANDOM:
            pretrain_arm(options, arm, seed)
        if options.stage in ("all", "probe"):
            if arm == RANDOM:
                random_arm(options, seed)
            print(arm, seed, probe_arm(options, arm, seed), flush=True)
    if options.stage in ("all", "report"):
        about = {name: getattr(options, name) for name in ("epochs", "width", "depth", "per_class", "probe_epochs")}
        pixels = raw_pixels(options)
        print(f"raw pixels, linear: {pixels:.2f} %")
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": options.device_name}
        report(options, about | versions | {"raw_pixels_linear": pixels, "arms": load(options)})


if __name__ == "__main__":
    main()
