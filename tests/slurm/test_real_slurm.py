"""The example scripts on a real Slurm of one machine, as root: `pytest -m slurm`, which installs it where it can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install
from faults.victims import make_material

from nextblock.training.run_folder import read_metrics
from tiny_run import flags, tiny, write_images

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
SMALL = ["--cpus-per-task=1", "--mem=50"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := install():
        pytest.fail(why)
    folder = tmp_path_factory.mktemp("slurm")
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": here, "OMP_NUM_THREADS": "1", "HOME": os.environ.get("HOME", "/root")}
    with Cluster(folder, environment) as found:
        yield found


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_material(tmp_path_factory.mktemp("material"), noise=41)
    write_images(folder / "many", per_class=600)
    return folder


def alone(*arguments: str) -> None:
    """One process, without Slurm."""
    done = subprocess.run(
        [sys.executable, "-m", "nextblock.cli", *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.csv"
    return {int(row["step"]): float(row["loss"]) for row in read_metrics(file) if row["loss"]} if file.exists() else {}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_is_requeued_is_the_one_that_was_not(
    cluster: Cluster, material: Path, tmp_path: Path, processes: int
) -> None:
    training = {"epochs": 60, "device": "cpu", "checkpoint_every_steps": 1000}
    sections = tiny(data={"train": material / "images"}, training=training, watch={"pictures": 0, "every_epochs": 1000})
    asked, cut, whole = ["--config", "xtra_cifar10", *flags(sections)], tmp_path / "cut", tmp_path / "whole"
    size = [f"--ntasks-per-node={processes}", f"--gpus-per-node={processes}", *SMALL]
    job = cluster.submit(*size, str(SCRIPTS / "pretrain.sbatch"), str(cut), *asked)
    cluster.wait(lambda: len(losses(cut)) > 20, "20 steps", job)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(lambda: f"job {job} is in Slurm's queue again" in cluster.told(job), "the requeue", job)
    stopped_at = max(losses(cut))
    assert stopped_at < 180
    cluster.finish(job)
    assert f"continuing {cut} after step {stopped_at} of 180" in cluster.told(job)
    alone("pretrain", *asked, "--out", str(whole))
    assert sorted(losses(cut)) == list(range(1, 181))
    if processes == 1:
        assert losses(cut) == losses(whole)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


def arrays(material: Path) -> dict[str, tuple[list[str], list[str], str]]:
    """Script -> verb, options, what is compared."""
    probe = "--probe.heads linear --probe.lrs 1e-3 --probe.batch_size 2 --probe.workers 0 --probe.val_fraction 0.3"
    latents = f"--dataset {material / 'images'} --vae {material / 'vae'} --image_size_px 96 --shard_mb 1 --workers 0"
    suite = f"{material / 'encoder'} --suite xtra15 --data_root {material / 'datasets'} {probe} --probe.epochs 2"
    sampled = f"{material / 'generator'} --n 26 --batch_size 4 --steps 2 --device cpu --animation 2"
    embedded = f"{material / 'encoder'} {material / 'noise'} --batch_size 1 --workers 0"
    return {
        "cache_latents_array": (["cache-latents"], [*latents.split(), "--dtype=float32"], "*"),
        "prepare_array": (["prepare"], [str(material / "many"), "--shard_mb=1", "--workers=0"], "*"),
        "sample_array": (["sample"], sampled.split(), "images/*"),
        "probe_suite_array": (["probe"], [*suite.split(), f"--probe.cache={material / 'kept'}"], "results.jsonl"),
        "embed_array": (["embed"], embedded.split(), ""),
    }


@pytest.mark.parametrize(
    "name", ["cache_latents_array", "prepare_array", "sample_array", "probe_suite_array", "embed_array"]
)
def test_an_array_makes_what_one_process_makes(name: str, cluster: Cluster, material: Path, tmp_path: Path) -> None:
    verb, options, compared = arrays(material)[name]
    cut, whole = (tmp_path / f"{which}{'' if compared else '.parquet'}" for which in ("cut", "whole"))
    script = str(SCRIPTS / f"{name}.sbatch")
    first = cluster.submit("--array=1", *SMALL, "--export=ALL,NEXTBLOCK_SHARE=2/3", script, str(cut), *options)
    cluster.finish(first)  # a part is there
    job = cluster.submit("--array=0-1", *SMALL, script, str(cut), *options)
    cluster.finish(job)
    told = cluster.told(job)
    assert "share 2 of 2" in told or "already complete" in told  # the other one may have found all there
    alone(*verb, *options, "--out", str(whole))
    assert made(cut, compared) == made(whole, compared)


def made(out: Path, compared: str) -> dict[str, bytes]:
    files = [file for file in out.glob(compared) if file.is_file()] if compared else [out]
    assert files
    return {"" if file == out else file.name: file.read_bytes() for file in files}
