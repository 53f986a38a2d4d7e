from __future__ import annotations

from pathlib import Path

import pytest

from tiny_run import tiny, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with labelled validation images."""
    from nextblock.jobs.pretrain import pretrain

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    sections = tiny(data={"train": str(images), "val": str(images)})
    pretrain(**sections, config="xtra_cifar10", out=folder, quiet=True)
    return folder
