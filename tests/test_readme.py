"""The README's tree is the tree, and its commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nextblock.cli import main
from small_kl16 import write_kl16
from tiny_run import flags, tiny, write_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Runs for minutes: the same job is tested in small in tests/jobs/test_use.py.
LONG = {"nextblock demo"}
# The commands about generation, in small.
SIZES = {"model.width": "16", "model.depth": "2", "model.num_heads": "2", "training.batch_size": "4",
         "training.epochs": "1", "watch.pictures": "2", "watch.steps": "2", "data.workers": "0"}  # fmt: skip
GENERATION = {
    "train-generator": [part for name, value in SIZES.items() for part in (f"--{name}", value)],
    "sample": ["--steps", "2"],
    "cache-latents": ["--image_size_px", "32", "--workers", "0"],
    "fid": ["--workers", "0"],
}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line.startswith("nextblock") and line not in LONG]


def test_the_tree_is_the_tree() -> None:
    (tree,) = [block for block in blocks("") if "src/nextblock/" in block]
    described: list[str] = []
    folder = ""
    for line in tree.splitlines():
        path, clause = line.split(maxsplit=1)
        assert clause.strip(), f"{path} has no clause"
        if path.endswith("/"):
            folder = path
        else:
            described.append(folder + path if line.startswith(" ") else path)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    unnamed = ("__init__.py", "py.typed")
    source = [path for path in tracked if path.startswith("src/nextblock/") and not path.endswith(unnamed)]
    assert sorted(path for path in described if path.startswith("src/")) == sorted(source)
    assert all((ROOT / path).exists() for path in described)


def test_there_is_a_command_for_every_job() -> None:
    from nextblock.cli import VERBS

    verbs = {command.split()[1] for command in [*commands(), *LONG]}
    assert verbs == set(VERBS)


def test_the_commands_run_in_the_order_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "photos", per_class=6)
    write_kl16(tmp_path / "kl16.ckpt")
    shutil.copy(ROOT / "tests" / "data" / "xtra_base.ckpt", tmp_path / "xtra_b16.ckpt")
    small = tiny()
    for command in commands():
        arguments = shlex.split(command)[1:]
        if arguments[0] == "finetune":
            arguments += ["--finetune.ema_decay", "0.9", "--training.epochs", "1", "--finetune.workers", "0"]
        if arguments[0] == "pretrain" and "--resume" not in arguments:
            arguments += flags(small)
        arguments += GENERATION.get(arguments[0], [])
        if arguments[0] == "profile":
            arguments += [*flags({name: values for name, values in small.items() if name != "watch"}), "--warmup", "1"]
        if "xtra_b16.ckpt" in arguments:  # a small model, of no preset
            arguments += ["--num_heads", "3", "--predictor_heads", "4"]
        if "xar_b_in256" in arguments:
            arguments += ["--model.latent_size", "2", "--model.entity_size", "1"]
        assert main(arguments) == 0, f"{command}\n{capsys.readouterr()}"
    for code in blocks("python"):
        code = code.replace('training={"epochs": 1}', f"**{small!r} | {{'data': {{'train': 'photos'}}}}")
        code = code.replace('data={"train": "photos"}, ', "")
        exec(compile(code, "README", "exec"), {"__name__": "__main__"})
    made = {path.name for path in tmp_path.iterdir()}
    assert {"features.parquet", "pictures", "runs"} <= made


def test_make_commands_come_first() -> None:
    assert blocks("sh")[0].splitlines()[0].startswith("make demo")
    assert blocks("sh")[0].splitlines()[1].startswith("make test")
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, flags=re.M)
    assert re.search(r"^test:", makefile, flags=re.M)


def test_pictures_and_links_are_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert all(link.startswith("http") or (ROOT / link).exists() for link in links)


def test_every_recipe_is_listed() -> None:
    from nextblock.recipes.config import recipe_names

    assert all(f"| `{name}` |" in README for name in recipe_names())
