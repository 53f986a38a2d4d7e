"""One command that begins a run or continues it, as a launcher that restarts processes needs: OUT IMAGES."""

from __future__ import annotations

import sys

from nextblock.cli import main
from nextblock.jobs.pretrain import WATCHED
from nextblock.jobs.starting import FREE_ON_RESUME, continued
from nextblock.recipes.config import PRETRAIN
from tiny_run import flags, tiny


def sections(images: str) -> dict[str, dict[str, object]]:
    training = {"epochs": 100, "checkpoint_every_steps": 40, "devices": 2, "device": "cpu"}
    return tiny(data={"train": images}, training=training, watch={"pictures": 0, "every_epochs": 1000})


if __name__ == "__main__":
    out, images = sys.argv[1:]
    given = sections(images)
    found = continued(
        PRETRAIN, given, FREE_ON_RESUME | WATCHED, resume="auto", out=out, config="xtra_cifar10", preset=None,
        init_from=None,
    )  # fmt: skip
    fresh = ["--config", "xtra_cifar10", *flags(given), "--out", out]
    sys.exit(main(["pretrain", *(fresh if found is None else ["--resume", str(found[0])])]))
