"""`nextblock profile`: the steps of a recipe, timed, and the advice that follows."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_generator
from nextblock.cli import _parser
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.profile import SECTIONS, Profile, profile
from nextblock.jobs.profile_advice import Findings, Setting, advice
from nextblock.training.memory import GIB
from nextblock.xtra.model import XTRA
from tiny_run import tiny

SHORT: dict[str, Any] = {"steps": 2, "warmup": 1, "quiet": True}


@pytest.fixture(scope="module")
def profiled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Of a tiny pre-training, with a validation set that is not there: it is not looked at."""
    out = tmp_path_factory.mktemp("profiles") / "xtra"
    return profile(config="xtra_cifar10", out=out, **tiny(data={"train": str(images), "val": "/nowhere"}), **SHORT)


def test_the_folder_holds_what_is_told_and_nothing_of_a_run(profiled: Profile) -> None:
    assert {path.name for path in profiled.folder.iterdir()} == {
        "profile.json",
        "table.md",
        "profile.png",
        "trace.json",
    }
    told = json.loads((profiled.folder / "profile.json").read_text())
    assert told == profiled.values
    assert told["steps"] == {"warmup": 1, "marked": 2, "bare": 2, "traced": 3}
    assert sum(phase["mean_s"] for phase in told["phases"]) == pytest.approx(told["marked_step_s"]["mean"], rel=1e-9)
    assert sum(phase["share"] for phase in told["phases"]) == pytest.approx(1)
    assert told["images_per_s"] == pytest.approx(8 / told["step_s"]["mean"])
    assert told["mfu"] == pytest.approx(told["flops_per_image"] * told["images_per_s"] / told["ceiling_flops_per_s"])
    assert 0 < told["mfu"] < 1
    assert told["flops_per_image_of_all_tokens"] > told["flops_per_image"]
    assert told["tokens"] == 16
    assert told["overhead"]["low"] <= told["overhead"]["median"] <= told["overhead"]["high"]
    assert told["setting"]["source_side_px"] == 20
    assert told["setting"]["wanted_side_px"] == 16
    assert told["memory"]["peak"] > 0
    table = (profiled.folder / "table.md").read_text()
    assert all(f"\n| {phase['name']} |" in table for phase in told["phases"])
    assert all(f"\n- {line}" in table for line in told["advice"])


def test_a_full_folder_is_left_alone(profiled: Profile, images: Path) -> None:
    before = (profiled.folder / "profile.json").read_bytes()
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        profile(config="xtra_cifar10", out=profiled.folder, **tiny(data={"train": str(images)}), **SHORT)
    assert (profiled.folder / "profile.json").read_bytes() == before


def test_a_generator_is_profiled_by_the_same_options(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = tiny_generator.tiny(data={"train": str(images)})
    found = profile(config="xar_cifar10", **sections, **(SHORT | {"quiet": False}))
    assert found.folder.parent == Path("runs")
    assert found.folder.name.startswith("profile-xar_cifar10-")
    assert found.values["verb"] == "train-generator"
    names = [phase["name"] for phase in found.values["phases"]]
    assert names[3:7] == ["tokens in", "layers", "tokens out", "loss"]
    said = capsys.readouterr().out
    assert all(
        word in said for word in ("images/s", "MFU", "GFLOP", "GiB", "trace.json", *names, *found.values["advice"])
    )


def test_a_slow_source_is_found_and_workers_are_advised(tmp_path: Path) -> None:
    class Slow:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            time.sleep(0.01)
            return np.full((16, 16, 3), index, dtype=np.uint8)

    found = profile(config="xtra_cifar10", out=tmp_path / "p", **tiny(data={"train": Slow()}), **SHORT).values
    shares = {phase["name"]: phase["share"] for phase in found["phases"]}
    assert shares["data"] == max(shares.values()) > 0.5
    (said,) = [line for line in found["advice"] if "waits for data" in line]
    assert "with 0 workers" in said
    assert "Set data.workers to" in said
    assert not any("nextblock prepare" in line for line in found["advice"])  # there is nothing to decode


def test_workers_are_measured_alone(images: Path, tmp_path: Path) -> None:
    sections = tiny(data={"train": str(images), "workers": 1}, training={"per_device_batch": 5})
    found = profile(config="xtra_cifar10", out=tmp_path / "p", **sections, **SHORT).values
    assert found["loader_images_per_s"] > 0
    assert 0 <= found["waiting_in_a_long_run"] < 1
    assert (found["setting"]["passes"], found["setting"]["pass_images"]) == (2, 4)


def test_a_runs_configuration_is_a_recipe(run: Path, tmp_path: Path) -> None:
    found = profile(config=run / "config.yaml", out=tmp_path / "p", **SHORT)
    assert found.values["setting"]["batch"] == 8


def test_without_a_recipe_the_sizes_are_chosen_as_for_pretraining(images: Path, tmp_path: Path) -> None:
    given = tiny(data={"train": str(images)})
    del given["model"]["patch_size_px"], given["model"]["cell_size"]
    found = profile(out=tmp_path / "p", **given, **SHORT)
    assert found.values["verb"] == "pretrain"
    assert found.values["setting"]["images"] == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": "xar_cifar1"}, "No recipe 'xar_cifar1' .* Did you mean 'xar_cifar10'.*xtra_digits"),
        ({"preset": "xar_x"}, "No preset 'xar_x'. Did you mean 'xar_"),
        ({"config": "xtra_cifar10", "model": {"latent_size": 8}}, "no key 'model.latent_size'"),
        ({"config": "xtra_cifar10"}, "No images to train on"),
        ({"config": "xar_cifar10"}, "No images to train on.*cached latents"),
        ({"config": "xtra_cifar10", "steps": 0}, "steps must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_profiled_is_told_and_leaves_no_folder(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        profile(out=tmp_path / "p", **(SHORT | values))
    assert not (tmp_path / "p").exists()


def test_a_recipe_with_a_mistake_is_read_as_what_it_nearly_is(tmp_path: Path) -> None:
    for section in ("model:\n  width: 16\n  predictor_widht: 8\n", "model:\n  latent_size: 8\n  patch_sise: 2\n"):
        (tmp_path / "r.yaml").write_text(section)
        wrong = section.split()[-2].removesuffix(":")
        with pytest.raises(ConfigError, match=f"no key 'model.{wrong}'. Did you mean"):
            profile(config=tmp_path / "r.yaml", **SHORT)


def test_an_interrupted_profile_can_be_repeated(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    values: dict[str, Any] = {"config": "xtra_cifar10", "out": tmp_path / "p", **tiny(data={"train": str(images)})}
    with monkeypatch.context() as patch:
        patch.setattr(XTRA, "forward", interrupt)
        patch.setattr("nextblock.jobs.training_run.require_room_for", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            profile(**values, **SHORT)
    assert list((tmp_path / "p").iterdir()) == []
    assert profile(**values, **SHORT).values["advice"]


def test_the_shell_takes_the_sections_of_every_recipe(tmp_path: Path) -> None:
    parser = _parser("profile", profile, SECTIONS)
    given = "--config r --model.image_size_px=[16,32] --model.latent_size=8 --training.ema_decay 0.9 --steps 3"
    found = parser.parse_args([*given.split(), "--data.mean=[0.5]"], defaults=False).as_dict()
    assert found["model"] == {"image_size_px": (16, 32), "latent_size": 8}
    assert found["data"] == {"mean": (0.5,)}
    assert (found["training"], found["steps"]) == ({"ema_decay": 0.9}, 3)
    shown = " ".join(parser.format_help().split())
    assert "patches along one side of a cell" in shown
    assert "of the average of the weights" in shown
    assert "a folder of latents made by" in shown


# --- advice

SETTING = Setting(
    device="cuda", bf16=True, compiled=True, pinned=True, workers=15, cores=16, threads=16, batch=256, pass_images=256,
    passes=1, images=10_000, source_side_px=300, wanted_side_px=256, prepared=False,
)  # fmt: skip
QUIET = Findings(
    shares={"data": 0.0, "transfer": 0.01, "optimizer": 0.02, "other": 0.01}, step_s=0.1, waiting=0.0,
    workers_needed=0, mfu=0.5, peak=60 * GIB, free=20 * GIB,
)  # fmt: skip


def advised(setting: dict[str, Any], **found: Any) -> str:
    shares = QUIET.shares | found.pop("shares", {})
    return "\n".join(
        advice(dataclasses.replace(SETTING, **setting), dataclasses.replace(QUIET, shares=shares, **found))
    )


def test_a_good_step_needs_no_advice() -> None:
    assert advised({}).startswith("Nothing stands out")


def test_advice_on_data_names_what_is_not_in_force() -> None:
    waits: dict[str, Any] = {"shares": {"data": 0.5}, "waiting": 0.5}
    assert "Set data.workers to 8." in advised({"workers": 4}, workers_needed=8, **waits)
    assert "Set data.workers to 15; about 40 would keep up" in advised({"workers": 4}, workers_needed=40, **waits)
    taken = advised({}, workers_needed=40, **waits)
    assert "Set data.workers" not in taken
    assert "The cores are taken" in taken
    assert "nextblock prepare IMAGES --out SHARDS" in taken
    assert "--short_side" not in taken  # the images are hardly larger than needed
    assert "500 px, and training takes 256 px" in advised({"source_side_px": 500}, **waits)
    assert "--short_side 320" in advised({"source_side_px": 500}, **waits)
    assert "prepare" not in advised({"prepared": True}, **waits)
    assert "prepare" not in advised({"source_side_px": None}, **waits)
    assert "in a long run (1 % here" in advised({}, shares={"data": 0.01}, waiting=0.6)


def test_advice_on_the_device() -> None:
    slow = advised({"bf16": False, "compiled": False}, mfu=0.1)
    assert "set training.compile true and training.precision bf16." in slow
    assert "set training.compile true." in advised({"compiled": False}, mfu=0.1)
    assert advised({}, mfu=0.1).startswith("Nothing stands out")  # its memory is used
    room: dict[str, Any] = {"mfu": 0.1, "peak": 10 * GIB, "free": 60 * GIB}
    assert "60.0 GiB of its memory stay free: raise training.per_device_batch from 64 to 256." in advised(
        {"pass_images": 64, "passes": 8}, **room
    )
    assert "from 64 to 128." in advised({"pass_images": 64, "passes": 2}, **room)
    assert "a larger training.batch_size than 256 fits" in advised({}, **room)
    assert "the link is slow" in advised({}, shares={"transfer": 0.2})
    assert advised({"device": "cpu"}, **room, shares={"transfer": 0.2}).startswith("Nothing stands out")


def test_advice_on_short_steps_and_threads() -> None:
    assert "a larger training.batch_size than 256 spreads" in advised({}, shares={"optimizer": 0.3})
    assert advised({"images": 300}, shares={"optimizer": 0.3}).startswith("Nothing")  # a larger batch repeats images
    assert "the host's own work" in advised({}, shares={"other": 0.3})
    assert "set OMP_NUM_THREADS=12." in advised({"device": "cpu", "threads": 2, "workers": 4})
    assert advised({"device": "cpu", "threads": 12, "workers": 4}).startswith("Nothing")


def test_the_largest_share_comes_first() -> None:
    lines = advised({"workers": 4}, shares={"optimizer": 0.3, "data": 0.2}, waiting=0.2).splitlines()
    assert ["optimiser" in lines[0], "waits for data" in lines[1], "prepare" in lines[2]] == [True] * 3


def test_cached_latents_are_profiled(images: Path, tmp_path: Path) -> None:
    from nextblock.jobs.cache_latents import cache_latents
    from small_kl16 import write_kl16

    write_kl16(tmp_path / "kl16.ckpt")
    cache_latents(
        dataset=str(images),
        vae=str(tmp_path / "kl16.ckpt"),
        out=tmp_path / "l",
        image_size_px=32,
        workers=0,
        quiet=True,
    )
    sections = tiny_generator.tiny(data={"train": str(tmp_path / "l")})
    for name in ("latent_size", "latent_channels", "patch_size", "num_classes"):
        del sections["model"][name]
    sections["model"] |= {"entity_size": 1}
    found = profile(preset="xar_ti", out=tmp_path / "p", **sections, **SHORT).values
    assert found["setting"]["source_side_px"] is None
