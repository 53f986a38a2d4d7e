"""Tar shards for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, value // 256, 7)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes: list[int], labels: str = "cls", name: str = "train-{:06d}.tar") -> list[Path]:
    """Image n of all has the value n, and the label n % 3."""
    paths, n = [], 0
    for number, size in enumerate(sizes):
        members = {}
        for _ in range(size):
            members[f"{n:05d}.png"] = png(n)
            if labels == "cls":
                members[f"{n:05d}.cls"] = str(n % 3).encode()
            elif labels == "json":
                members[f"{n:05d}.json"] = json.dumps({"label": n % 3, "fine": n}).encode()
            n += 1
        paths.append(write_tar(folder / name.format(number), members))
    return paths
