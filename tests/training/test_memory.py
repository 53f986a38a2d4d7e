"""What a forward pass keeps, counted before it is run at full size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from nextblock.errors import RunError
from nextblock.training import memory
from nextblock.training.config import TrainingConfig
from nextblock.training.memory import (
    GIB,
    bytes_per_image,
    bytes_to_come,
    free_bytes,
    machine_free_bytes,
    require_room,
    require_room_for,
    saved_bytes,
)
from nextblock.training.plan import Plan

CPU = torch.device("cpu")


def test_what_a_pass_keeps_is_counted_once_and_by_image() -> None:
    model = nn.Sequential(nn.Linear(10, 30, bias=False), nn.Tanh(), nn.Linear(30, 1, bias=False))

    def loss_of(images: int) -> Tensor:
        return model(torch.ones(images, 10)).sum()

    # Kept for each image: 10 inputs, and 30 numbers after the tanh, which two operations need and share.
    assert bytes_per_image(loss_of) == 4 * (10 + 30)
    weight = 4 * 30  # of the last map; the first needs none, as its input has no gradient
    assert saved_bytes(lambda: loss_of(1)) == 4 * (10 + 30) + weight


def test_too_many_images_are_refused_with_a_number_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * GIB)
    require_room(GIB, 24, CPU)
    with pytest.raises(RunError, match=r"2,048 images .* about 2,048 GiB, and cpu has 24 GiB .*per_device_batch to 8 "):
        require_room(GIB, 2048, CPU)
    with pytest.raises(RunError, match="per_device_batch to 1 "):
        require_room(20 * GIB, 2, CPU)
    with pytest.raises(RunError, match="Not even one image"):
        require_room(1024 * GIB, 2, CPU)


def test_what_else_a_run_needs_and_who_else_needs_it_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * GIB)
    require_room(GIB, 16, CPU, fixed=8 * GIB)
    with pytest.raises(RunError, match=r"17 images .* 25 GiB.*per_device_batch to 8 "):
        require_room(GIB, 17, CPU, fixed=8 * GIB)
    require_room(GIB, 4, CPU, fixed=8 * GIB, sharing=2)
    with pytest.raises(RunError, match=r"5 images .* each of 2 processes .*per_device_batch to 2 "):
        require_room(GIB, 5, CPU, fixed=8 * GIB, sharing=2)
    with pytest.raises(RunError, match="Not even one image"):
        require_room(0, 5, CPU, fixed=25 * GIB)


def test_what_is_not_known_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    require_room(1024 * GIB, 2048, CPU)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "MemTotal: 5 kB\n")  # an old kernel
    assert free_bytes(CPU) is None


def test_moments_average_and_gradients_are_to_come() -> None:
    model = nn.Linear(10, 5)
    model.bias.requires_grad_(False)
    copy = 4 * 50
    assert bytes_to_come(model, averaged=False, accumulated=False) == 2 * copy
    assert bytes_to_come(model, averaged=True, accumulated=False) == 3 * copy
    assert bytes_to_come(model, averaged=True, accumulated=True) == 4 * copy


class Ones:
    """A batch of ones."""

    def __init__(self, count: int) -> None:
        self.values, self.bad = torch.ones(count, 2**20), ()

    def to(self, device: torch.device) -> Ones:
        return self


def test_a_few_images_tell_whether_a_pass_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, asked = nn.Sequential(nn.Linear(2**20, 1, bias=False), nn.Dropout(0.5)), []

    def load(positions: Sequence[int]) -> Ones:
        asked.append(list(positions))
        return Ones(len(positions))

    def check(**values: int) -> None:
        plan = Plan(5000, TrainingConfig(**({"batch_size": 2048} | values)))  # type: ignore[arg-type]
        require_room_for(fabric, model, lambda model, batch, step: model(batch.values).sum(), load, plan)

    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB)
    before = torch.get_rng_state()
    with pytest.raises(RunError, match=r"2,048 images .* about 8\.0 GiB.*per_device_batch to 64 "):
        check()
    assert sorted(asked) == [[0, 1], [0, 1, 2, 3]]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    check(per_device_batch=64)
    asked.clear()
    check(per_device_batch=4)
    assert asked == []


def test_running_statistics_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1))
    fabric = Fabric(accelerator="cpu", devices=1)

    def loss_of(module: nn.Module, batch: Tensor, step: int) -> Tensor:
        return module(batch).sum()

    plan = Plan(64, TrainingConfig(batch_size=32), 0, 1)
    seen: list[int] = []

    def load(positions: Sequence[int]) -> Tensor:
        seen.append(len(positions))
        return torch.randn(len(positions), 3) + 5

    require_room_for(fabric, model, loss_of, load, plan)
    assert seen
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert model[0].num_batches_tracked == 0


def test_free_memory_is_that_of_the_machine() -> None:
    free = free_bytes(CPU)
    assert free is None or 2**20 < free < 2**50


def machine(root: Path, **files: str) -> Path:
    """A made-up machine with 8 GiB free; file names with __ for /."""
    lines = {"proc__meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"} | files
    for name, text in lines.items():
        file = root / name.replace("__", "/").replace("memory_", "memory.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V2, V1 = "sys__fs__cgroup__", "sys__fs__cgroup__memory__"


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert machine_free_bytes(tmp_path) is None
    assert machine_free_bytes(machine(tmp_path)) == 8 * GIB


def test_a_container_has_what_is_left_of_its_limit(tmp_path: Path) -> None:
    files = {"memory_max": f"{4 * GIB}\n", "memory_current": f"{3 * GIB}\n"}
    v2 = {V2 + name: text for name, text in files.items()}
    assert machine_free_bytes(machine(tmp_path / "bare", **v2)) == GIB
    # the path of the host, which is not there inside
    assert machine_free_bytes(machine(tmp_path / "host", proc__self__cgroup="0::/docker/1a2b\n", **v2)) == GIB
    # 2 GiB of what is used are files read before, and go when they must
    cached = v2 | {V2 + "memory_stat": f"anon {GIB}\ninactive_file {2 * GIB}\n"}
    assert machine_free_bytes(machine(tmp_path / "cached", **cached)) == 3 * GIB
    v1 = {V1 + "memory_limit_in_bytes": f"{4 * GIB}", V1 + "memory_usage_in_bytes": f"{3 * GIB}"}
    v1 |= {V1 + "memory_stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n"}
    assert machine_free_bytes(machine(tmp_path / "v1", **v1)) == 2 * GIB
    lines = "5:cpu,cpuacct:/a\n4:memory:/docker/1a2b\n0::/\n"
    assert machine_free_bytes(machine(tmp_path / "v1 host", proc__self__cgroup=lines, **v1)) == 2 * GIB


def test_the_smallest_of_all_limits_above_the_process_counts(tmp_path: Path) -> None:
    def groups(name: str, outer: str, inner: str) -> Path:
        files = {V2 + "slurm__memory_max": outer, V2 + "slurm__memory_current": f"{GIB}"}
        files |= {V2 + "slurm__job__memory_max": inner, V2 + "slurm__job__memory_current": f"{GIB}"}
        return machine(tmp_path / name, proc__self__cgroup="0::/slurm/job\n", **files)

    assert machine_free_bytes(groups("inner", f"{6 * GIB}", f"{3 * GIB}")) == 2 * GIB
    assert machine_free_bytes(groups("outer", f"{2 * GIB}", "max\n")) == GIB
    assert machine_free_bytes(groups("machine", f"{50 * GIB}", f"{40 * GIB}")) == 8 * GIB
    assert machine_free_bytes(groups("over", f"{GIB // 2}", "max")) == 0


def test_no_limit_and_what_cannot_be_read_refuse_nothing(tmp_path: Path) -> None:
    unlimited = {V1 + "memory_limit_in_bytes": "9223372036854771712", V1 + "memory_usage_in_bytes": "5"}
    assert machine_free_bytes(machine(tmp_path / "none", **unlimited)) == 8 * GIB
    odd = {V2 + "memory_max": "soon", V2 + "memory_current": "5", "proc__self__cgroup": "odd\n\n0::/../..\n"}
    assert machine_free_bytes(machine(tmp_path / "odd", **odd)) == 8 * GIB
