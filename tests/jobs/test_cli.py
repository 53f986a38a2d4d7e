"""What a person sees in the shell: answers, and messages of one or two lines that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextblock.cli import VERBS, main
from tiny_run import flags, tiny, write_images


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.err if code else captured.out


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, message = told(capsys, *arguments)
    assert code != 0, message
    assert "Traceback" not in message
    assert 1 <= len(message.strip().splitlines()) <= 2, message
    return message


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, "--help")
    assert code == 0
    assert all(verb in text for verb in VERBS)
    assert told(capsys)[0] == 0
    assert told(capsys, "--version")[1].strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"nextblock {verb}" in capsys.readouterr().out


def test_wrong_verbs_and_options_name_the_nearest(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    assert "Did you mean 'pretrain'?" in failure(capsys, "pretrian")
    assert "Did you mean '--training.epochs'?" in failure(capsys, "pretrain", "--training.epoch", 3)
    assert "Expected a whole number" in failure(capsys, "pretrain", "--training.batch_size", "many")
    assert "No run or weights" in failure(
        capsys, "pretrain", "--init-from", "none", "--config", "xtra_cifar10", "--data.train", images
    )
    assert "run" in failure(capsys, "knn")
    assert "--data.train" in failure(capsys, "pretrain", images)


def test_wrong_recipes_presets_and_keys_name_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "Did you mean 'xtra_cifar10'?" in failure(capsys, "pretrain", "--config", "xtra_cifar")
    assert "Did you mean 'xtra_s16'?" in failure(capsys, "pretrain", "--preset", "xtra_s14")
    recipe = tmp_path / "mine.yaml"
    for text, message in {
        "model: {widht: 64}": "no key 'model.widht'. Did you mean 'width'?",
        "modle: {width: 64}": "no section 'modle'. Did you mean 'model'?",
        "training: {crop_scale: [0.3, 1]}": "Did you mean 'data.crop_scale'?",
        "model: [": "not valid YAML",
        "just text": "not a recipe",
        "model: {width: wide}": "model.width",
        "model: {width: 100}": "not divisible by num_heads",
        "model: {image_size_px: 224, patch_size_px: 16}": "Nearest sizes that fit this grid: 2 and 7",
        "training: {epochs: -1}": "training.epochs must be above 0",
    }.items():
        recipe.write_text(text)
        assert message in failure(capsys, "pretrain", "--config", recipe, "--data.train", tmp_path)
    assert "No such file" in failure(capsys, "pretrain", "--config", tmp_path / "none.yaml")


def test_wrong_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    def pretrain(path: object, *more: object) -> str:
        return failure(capsys, "pretrain", "--config", "xtra_cifar10", "--data.train", path, *more)

    assert "--data.train" in failure(capsys, "pretrain", "--config", "xtra_cifar10")
    assert "images" in pretrain(images.parent / "imagse")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in pretrain(empty)
    (empty / "notes.txt").write_text("no image")
    assert ".txt" in pretrain(empty)
    assert "Did you mean" in pretrain(tmp_path / "emty")
    for i in range(12):
        (empty / f"{i}.png").write_bytes(b"")
    assert "100 samples in a row" in pretrain(empty, "--out", tmp_path / "a", "--data.workers", 0)


def test_a_label_column_that_does_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(images.rglob("*.png"))]
    pq.write_table(pa.table({"image": content, "lable": [0, 1] * 12}), tmp_path / "train.parquet")
    message = failure(
        capsys, "pretrain", "--config", "xtra_cifar10", "--data.train", tmp_path / "train.parquet",
        "--data.label_column", "label",
    )  # fmt: skip
    assert "lable" in message


def test_places_that_cannot_be_written(capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path) -> None:
    sections = tiny(data={"train": images})
    start = ["pretrain", "--config", "xtra_cifar10", *flags(sections)]
    (tmp_path / "file").write_text("")
    message = failure(capsys, *start, "--out", tmp_path / "file" / "run")
    assert "cannot write" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    message = failure(capsys, *start, "--out", tmp_path / "full")
    assert "nothing is ever overwritten" in message
    assert "--resume" not in message, "it is no run"


def test_no_run_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    assert "No run or weights folder" in failure(capsys, "knn", tmp_path / "none")
    assert "not a run folder" in failure(capsys, "pretrain", "--resume", tmp_path)
    assert "not a run folder" in failure(capsys, "embed", tmp_path, images, "--out", tmp_path / "f.npz")
    assert "does not exist" in failure(capsys, "pretrain", "--resume", tmp_path / "none")


def test_cuda_where_there_is_none(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "No CUDA device" in failure(capsys, "knn", run, "--device", "cuda")


def test_jobs_in_the_shell(capsys: pytest.CaptureFixture[str], run: Path, images: Path, tmp_path: Path) -> None:
    code, text = told(capsys, "knn", run, "--k", 1, 3)
    assert code == 0
    assert "kNN accuracy, k = 1: 100.00 %" in text
    code, text = told(capsys, "embed", run, images / "top", images / "left", "--out", tmp_path / "f.parquet")
    assert code == 0
    assert "24 images embedded" in text
    picture = next((images / "top").iterdir())
    code, text = told(capsys, "reconstruct", run, picture, "--out", tmp_path / "pictures")
    assert code == 0
    assert "1 pictures and contact-sheet.png" in text
    assert told(capsys, "doctor")[0] == 0


def test_switches_take_any_yes_or_no(
    capsys: pytest.CaptureFixture[str], run: Path, images: Path, tmp_path: Path
) -> None:
    for i, words in enumerate((["--pool", "False"], ["--pool=no"], ["--pool", "0", "--quiet"])):
        assert told(capsys, "embed", run, images, *words, "--out", tmp_path / f"{i}.npz")[0] == 0
        assert np.load(tmp_path / f"{i}.npz")["features"].ndim == 3
    assert "perhaps" in failure(capsys, "embed", run, images, "--pool=perhaps", "--out", tmp_path / "x.npz")


def test_numbers_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], run: Path, images: Path, tmp_path: Path
) -> None:
    assert "--most must be at least 1" in failure(capsys, "reconstruct", run, images, "--most", 0)
    assert "--batch_size must be at least 1" in failure(capsys, "knn", run, "--batch_size", 0)
    assert "needs --out" in failure(capsys, "embed", run, images)


def test_a_given_image_size_is_fitted(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    for size in (32, 48, 96, 224, 100):
        code = main(["pretrain", "--data.train", str(images), "--model.image_size_px", str(size), "--print_config"])
        assert code == 0, capsys.readouterr().err
        assert f"image_size_px: {size}" in capsys.readouterr().out
    assert main(["pretrain", "--data.train", str(images), "--preset", "xtra_h14", "--print_config"]) == 0


def test_print_config_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, text = told(capsys, "pretrain", "--config", "xtra_b16_in1k", "--training.epochs", 3, "--print_config")
    (tmp_path / "mine.yaml").write_text(text)
    _, again = told(capsys, "pretrain", "--config", tmp_path / "mine.yaml", "--print_config")
    assert again == text
    assert "epochs: 3" in text


def test_unexpected_errors_hide_the_traceback_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("nextblock.jobs.doctor.doctor", broken)
    assert "--debug" in failure(capsys, "doctor")
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--debug"])


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys, nextblock, nextblock.cli; nextblock.cli.main(['--help']); "
        "print(sorted({'torch', 'numpy', 'lightning', 'jsonargparse', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_folder_without_permission(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    sections = tiny(data={"train": images})
    # Not even root may make folders in /proc.
    message = failure(capsys, "pretrain", "--config", "xtra_cifar10", *flags(sections), "--out", "/proc/run")
    assert "cannot write" in message


def test_interrupted_jobs_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nextblock.jobs.doctor.doctor", stopped)
    code, message = told(capsys, "doctor")
    assert code == 130
    assert "interrupted" in message


def test_truncated_images_are_told_and_left_out(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=1)
    file = folder / "top" / "000.png"
    file.write_bytes(file.read_bytes()[:200])
    code, text = told(capsys, "embed", run, folder, "--out", tmp_path / "f.npz")
    assert code == 0
    assert "left out: top/000.png" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    from importlib import import_module

    from nextblock.cli import _parser

    module = import_module(VERBS[verb][0])
    parser = _parser(verb, getattr(module, verb.replace("-", "_")), getattr(module, "SECTIONS", {}))
    silent = [
        a.dest for a in parser._actions if a.option_strings and not (a.help or "").split("(type:")[0].strip(" %s")
    ]
    assert not silent


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [("dtype", "int8", "Expected one of 'float16', 'float32'"), ("image_size_px", "big", "Expected a whole number")],
)
def test_options_that_may_be_left_out_say_what_they_take(
    capsys: pytest.CaptureFixture[str], option: str, value: str, wanted: str
) -> None:
    assert main(["cache-latents", "--dataset", "x", "--vae", "y", f"--{option}", value]) == 2
    told = capsys.readouterr().err
    assert f"{wanted}. Got value: {value}" in told
    assert "Union" not in told
