"""Real processes divide a job: two shares at once of which one is killed, then three. The result is that of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from faults.fork_server import ForkServer
from faults.victims import make_material
from PIL import Image

import nextblock
from nextblock.errors import ConfigError, RunError
from nextblock.jobs import share as shares
from nextblock.jobs.share import Share, Units, array_share, my_share

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Job:
    """A command without --out, what it makes as bytes, and the first path that its second share touches so many times
    before it is killed."""

    command: list[str]
    made: Callable[[Path], dict[str, bytes]]
    mark: tuple[str, int]
    suffix: str = ""


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def images_only(folder: Path) -> dict[str, bytes]:
    return all_files(folder / "images") | {"sheet": (folder / "contact-sheet.png").read_bytes()}


def results(folder: Path) -> dict[str, bytes]:
    rows = (folder / "results.jsonl").read_bytes()
    assert [json.loads(line)["status"] for line in rows.splitlines()].count("done") == 2
    return {name: (folder / name).read_bytes() for name in ("results.jsonl", "table.md")}


def one_file(path: Path) -> dict[str, bytes]:
    return {path.suffix: path.read_bytes()}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_material(tmp_path_factory.mktemp("material"), noise=41)
    (folder / "small").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2100, 16, 48, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "small" / f"{i:04d}.bmp")
    (folder / "small" / "0007.bmp").write_bytes(b"BM, but broken")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer() as found:
        yield found


def jobs(material: Path) -> dict[str, Job]:
    embed = f"embed {material / 'encoder'} {material / 'noise'} --batch_size 1 --workers 0"
    probe = "--probe.heads linear --probe.lrs 1e-3 --probe.batch_size 2 --probe.workers 0 --probe.val_fraction 0.3"
    return {
        "latents": Job(
            f"cache-latents --dataset {material / 'images'} --vae {material / 'vae'} --image_size_px 96 --shard_mb 1 "
            "--dtype float32 --workers 0".split(),
            all_files, (".shard-", 4),
        ),
        "prepare": Job(f"prepare {material / 'small'} --shard_mb 1 --workers 0".split(), all_files, ("small/1", 200)),
        "parquet": Job(embed.split(), one_file, ("part-", 1), ".parquet"),
        "npz": Job(embed.split(), one_file, ("part-", 1), ".npz"),
        "sample": Job(
            f"sample {material / 'generator'} --n 26 --batch_size 4 --steps 2 --device cpu --animation 2".split(),
            images_only, ("images/", 20),
        ),
        "suite": Job(
            f"probe {material / 'encoder'} --suite xtra15 --data_root {material / 'datasets'} {probe} --probe.epochs 2 "
            f"--probe.cache {material / 'features'}".split(),
            results, ("eurosat/checkpoints", 5),
        ),
    }  # fmt: skip


def array(index: int, count: int) -> dict[str, str]:
    """As Slurm has it for --array=4-N:2."""
    facts = {"ID": 4 + 2 * index, "MIN": 4, "STEP": 2, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in facts.items()}


def torchrun(index: int, count: int) -> dict[str, str]:
    return {"RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index)}


def together(count: int) -> list[dict[str, str]]:
    """As torchrun has it for processes that talk to each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [torchrun(i, count) | place | {"LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"} for i in range(count)]


def wait(server: ForkServer, pids: list[int]) -> list[int]:
    deadline = time.monotonic() + PATIENCE_S
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        assert time.monotonic() < deadline
        for pid in set(pids) - set(codes):
            if (code := server.poll(pid)) is not None:
                codes[pid] = code
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


@pytest.mark.parametrize("name", ["latents", "prepare", "parquet", "npz", "sample", "suite"])
def test_shares_make_what_one_process_makes(name: str, server: ForkServer, material: Path, tmp_path: Path) -> None:
    job, log = jobs(material)[name], tmp_path / "log"
    by_torchrun = name in ("latents", "npz")
    of = torchrun if by_torchrun else array
    whole, cut = (tmp_path / f"{which}{job.suffix}" for which in ("whole", "cut"))

    def start(out: Path, env: dict[str, str], suicide: tuple[str, int] | None = None) -> int:
        return server.start([*job.command, "--out", str(out)], log, suicide, env)

    assert wait(server, [start(whole, {})]) == [0], log.read_text()
    codes = wait(server, [start(cut, of(0, 2)), start(cut, of(1, 2), job.mark)])
    assert codes == [0, -9], log.read_text()
    text = log.read_text()
    assert "share 1 of 2" in text
    assert "other processes" in text or name == "suite"
    codes = wait(server, [start(cut, array(i, 3)) for i in range(3)])
    assert codes == [0, 0, 0], log.read_text()
    assert "Traceback" not in log.read_text()
    assert job.made(cut) == job.made(whole)
    left = {path.name for path in tmp_path.iterdir()} - {"log", "whole.features", "cut.features"}
    assert left == {whole.name, cut.name}, "locks and parts are gone"
    # once more, as a task does that is requeued after the others have finished
    assert wait(server, [start(cut, array(2, 3))]) == [0], log.read_text()
    assert job.made(cut) == job.made(whole)


@pytest.mark.parametrize("name", ["sample", "suite"])
def test_processes_of_torchrun_know_each_other(name: str, server: ForkServer, material: Path, tmp_path: Path) -> None:
    job, log, out = jobs(material)[name], tmp_path / "log", tmp_path / "out"
    options = [*job.command, "--out", str(out), *(["--probe.batch_size", "4"] if name == "suite" else [])]
    codes = wait(server, [server.start(options, log, None, environment) for environment in together(2)])
    assert codes == [0, 0], log.read_text()
    told = "contact-sheet.png in" if name == "sample" else "2 of the 15 data sets"
    assert log.read_text().count(told) == 1, "one of the two speaks"
    assert {path.name for path in tmp_path.iterdir()} == {"log", "out"}
    if name == "suite":
        results(out)
        return
    assert json.loads((out / "sample.json").read_text())["processes"] == 2
    alone = tmp_path / "alone"
    assert wait(server, [server.start([*job.command, "--out", str(alone)], log, None, {})]) == [0], log.read_text()
    assert job.made(out) == job.made(alone)


def test_which_share_is_ours() -> None:
    assert my_share({}) == Share(0, 1)
    assert array_share(array(2, 5)) == Share(2, 5)
    assert my_share(array(1, 3) | torchrun(1, 2)) == Share(3, 6)
    assert my_share({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}) == Share(1, 4)
    assert my_share({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Share()  # the script itself, before any srun
    assert my_share({"NEXTBLOCK_SHARE": "3/8"} | array(1, 3)) == Share(2, 8)
    assert my_share({"NEXTBLOCK_SHARE": "all"} | array(1, 3) | torchrun(1, 2)) == Share()
    taken = [unit for i in range(6) for unit in my_share(array(i // 2, 3) | torchrun(i % 2, 2)).of(range(20))]
    assert sorted(taken) == list(range(20))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"NEXTBLOCK_SHARE": "half"}, "NEXTBLOCK_SHARE must be as in 3/8, the third of eight, or all; got 'half'."),
        ({"NEXTBLOCK_SHARE": "9/8"}, "no share 9 of 8"),
        (array(1, 3) | {"SLURM_ARRAY_TASK_ID": "5"}, r"task 5 .* none of 3 evenly spaced .*--array=0-2"),
        (array(1, 3) | {"SLURM_ARRAY_TASK_ID": "70"}, r"task 70 .* none of 3"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not, so the number of tasks is not known"),
    ],
)
def test_what_is_no_share_is_refused(environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        my_share(environment)


@pytest.mark.parametrize(
    "job",
    [
        lambda: nextblock.sample(run="no-run"),
        lambda: nextblock.probe(run="no-run", suite="xtra15"),
    ],
    ids=["sample", "suite"],
)
def test_tasks_of_an_array_need_a_named_folder(job: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in array(1, 3).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"this is share 2 of 3, and .* --out"):
        job()
    monkeypatch.setenv("NEXTBLOCK_SHARE", "all")
    with pytest.raises(RunError, match="no-run"):
        job()


HOLD = (
    "import sys, time; from pathlib import Path; from nextblock.jobs.share import Share, Units\n"
    "with Units(Path(sys.argv[1]), Share()) as units:\n"
    "    print(units.claim([2, 3]), flush=True)\n"
    "    with units.alone():\n"
    "        print('alone', flush=True); sys.stdin.readline()\n"
    "    print('free', flush=True); sys.stdin.readline()\n"
)


def test_what_another_process_holds_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=environment,
    )  # fmt: skip
    assert other.stdout
    assert other.stdin
    assert [other.stdout.readline().strip() for _ in range(2)] == ["[2, 3]", "alone"]
    with monkeypatch.context() as patch:
        patch.setattr(shares, "WAIT_S", 0.1)
        with pytest.raises(RunError, match=r"another process is at .*out for more than .* Does it hang\?"):
            Units(target, Share()).__enter__()
    other.stdin.write("\n")
    assert other.stdout.readline().strip() == "free"
    with Units(target, Share()) as units:
        assert units.claim(range(6)) == [0, 1, 4, 5]
        other.kill()
        other.communicate()
        assert units.claim(range(6)) == [0, 1, 2, 3, 4, 5]
        with units.alone(), units.last() as got:
            assert got
    assert not list(tmp_path.iterdir())


def test_without_locks_one_process_works_and_several_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Units(tmp_path / "out", Share()) as units, units.alone():
        assert units.claim(range(3)) == [0, 1, 2]
    with pytest.raises(RunError, match=r"cannot be locked \(Function not implemented\)"):
        Units(tmp_path / "out", Share(0, 2)).__enter__()
