"""What a stranger's recipes, names, links and tars cannot do; SECURITY.md says it in words.

Files that try to run code while they are read are in tests/checkpoints/test_malicious_files.py.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import os
import pickletools
import sys
import tarfile
import typing
import zipfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock import cli
from nextblock.checkpoints.model_card import as_text
from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.errors import NextblockError
from nextblock.figures.canvas import save, show_image
from nextblock.jobs.predict import FORMULA, predict
from nextblock.jobs.prepare import prepare
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.visualize import visualize
from nextblock.recipes.config import kinds, typed_as
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.run_folder import read_metrics
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from tiny_run import TINY, flags, tiny, write_images

PACKAGE = Path(cli.__file__).parent

# --- what the package itself may call

# What reads or runs more than data -> the files that need it, and what keeps it harmless there.
ALLOWED = {
    "import pickle": {
        "training/checkpoint.py",  # names the error of torch.load
        "checkpoints/foreign_files.py",  # the same
        "data/workers.py",  # the error of what a worker that was killed had half sent
        "data/named/arrays.py",  # a reader that knows no names but stand-ins for arrays
    },
    "import tarfile": {"checkpoints/foreign_files.py"},  # tells what a file is; nothing is unpacked
    "import subprocess": {"training/run_record.py", "training/signals.py"},  # git and scontrol, by lists of words
    "torch.save": {"training/checkpoint.py", "jobs/converted_folder.py"},  # state.pt; weights for the official codes
    "torch.load": {"training/checkpoint.py", "checkpoints/foreign_files.py"},  # weights_only, see below
    "torch.jit.load": {"evaluation/extractors.py"},  # the Inception network, by its SHA-256
    "import_module": {  # of names that stand in the package
        "__init__.py", "cli.py", "jobs/doctor.py", "checkpoints/graphs.py", "data/named/arrays.py", "data/decoders.py",
    },
}  # fmt: skip
_MODULES = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "tarfile", "subprocess",
    "ctypes", "cffi", "runpy", "code", "pty", "imp", "dbm", "xml", "zipimport",
}  # fmt: skip
_CALLS = {
    "eval", "exec", "compile", "__import__", "import_module", "os.system", "os.popen", "os.execv", "os.execvp",
    "os.fork", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.dump", "torch.save",
    "torch.load", "torch.jit.load", "torch.package", "torch.hub.load", "shutil.unpack_archive",
}  # fmt: skip
_KEYWORDS = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}


def dangers(source: str) -> Iterator[str]:
    """What in the source is more than reading data: imports, calls by their names, keywords."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {root}" for name in node.names if (root := name.name.split(".")[0]) in _MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in _MODULES:
            yield f"import {node.module.split('.')[0]}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("importlib.")
            if name in _CALLS or name.endswith((".extractall", ".extract_all")):
                yield name
            given = {each.arg: each.value for each in node.keywords}
            for keyword, value in _KEYWORDS:
                found = given.get(keyword)
                if isinstance(found, ast.Constant) and found.value is value:
                    yield f"{keyword}={value}"
            safe = given.get("weights_only")
            if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "torch.load without weights_only"


def test_the_package_reads_data_and_runs_nothing() -> None:
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for danger in dangers(file.read_text(encoding="utf-8")):
            found.setdefault(danger, set()).add(file.relative_to(PACKAGE).as_posix())
    assert found == ALLOWED, {name: found.get(name, set()) ^ ALLOWED.get(name, set()) for name in {*found, *ALLOWED}}


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "import pickle"),
        ("from dill import loads", "import dill"),
        ("def f():\n  import marshal as m", "import marshal"),
        ("yaml.load(text)", "yaml.load"),
        ("torch.load(path)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=flag)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("subprocess.run(line, shell=True)", "shell=True"),
        ("archive.extractall(folder)", "archive.extractall"),
        ("eval(text)", "eval"),
    ],
)
def test_what_is_looked_for_is_found(source: str, danger: str) -> None:
    assert danger in set(dangers(source))
    assert not set(dangers("model.eval(); re.compile(x); torch.compile(model); yaml.safe_load(x); np.load(x)"))


# --- recipes make nothing but the typed configuration


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The dotted name of a class in a module that makes a file when it is imported, and that file."""
    sentinel = tmp_path / "sentinel"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "hostile_module.py").write_text(
        f"open({str(sentinel)!r}, 'w').close()\nclass Trap:\n    def __init__(self, **given): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield "hostile_module.Trap", sentinel
    assert "hostile_module" not in sys.modules
    assert not sentinel.exists()


def test_the_trap_would_spring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "springing_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("springing_module")
    assert (tmp_path / "sprung").exists()


def test_a_class_path_makes_no_object_anywhere_in_a_recipe(trap: tuple[str, Path], tmp_path: Path) -> None:
    hostile = {"class_path": trap[0], "init_args": {"path": "x"}}
    tried = 0
    for kind in kinds():
        for section, config in kind.sections.items():
            for field in dataclasses.fields(config):
                tried += 1
                with pytest.raises(NextblockError):
                    typed_as(kind, {section: {field.name: hostile}})
            with pytest.raises(NextblockError):
                typed_as(kind, {section: hostile})
    assert tried > 100


@pytest.mark.parametrize(
    "line", ["!!python/object/apply:{trap} []", "!!python/name:{trap} ''", "{{class_path: {trap}}}", "!{trap} {{}}"]
)
def test_nothing_of_the_shell_makes_objects_of_a_file(
    line: str, trap: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hostile.yaml"
    hostile = line.format(trap=trap[0])
    for text in (f"model: {hostile}\n", f"model:\n  width: {hostile}\n", f"data:\n  train: {hostile}\n", hostile):
        file.write_text(text)
        assert cli.main(["pretrain", "--config", str(file), "--out", str(tmp_path / "run")]) == 1
        for option in ("--data", "--training", "--model"):
            assert cli.main(["pretrain", option, str(file), "--out", str(tmp_path / "run")]) == 2
        run = tmp_path / "made"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(text)
        for verb in ("pretrain", "train-generator", "probe", "finetune"):
            assert cli.main([verb, "--resume", str(run)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_no_key_of_a_recipe_names_a_place_to_write() -> None:
    """All texts of all sections: where data and weights come from, which column and split, and choices."""
    texts = {
        f"{kind.verb}: {section}.{name}"
        for kind in kinds()
        for section, config in kind.sections.items()
        for name, hint in typing.get_type_hints(config).items()
        if str in (hint, *typing.get_args(hint))
    }
    data = ("train", "val", "train_split", "val_split", "image_column", "label_column", "decoder")
    assert texts == {f"{kind.verb}: data.{name}" for kind in kinds() for name in data} | {"train-generator: watch.vae"}


# --- names

HOSTILE = [
    b"=1+1.png", b"@SUM(A1).png", b"+1.png", b"-1.png", b"=HYPERLINK(x).bad.png",
    b"two\nlines.png", b"bell\x07\x1b]0;owned\x1b\\.png", b"a\rb.png", b"tab\there.png",
    b"<script>alert(1)<img src=x onerror=alert(1)>.png", b"\"quoted\", 'and', comma.png",
    b"$\\mathdefault{\\nonsense{$.png", b"$\\frac{1$.png", b"[red]colour[link=x].png", b"`code` ![x](y) *b*.png",
    b"not utf-8 \xff\xfe.png", "\u202egnp.exe.png".encode(), b"%s%n{0}.png", b"..%2f..%2fup.png", b"\\..\\up.png",
    b"~.png", b"$(touch x).png", b"; touch x.png", b"x" * 250 + b".png",
]  # fmt: skip
BROKEN = [b"=broken.png", b"<b>broken\n.png", b"\x1b[31mbroken \xff.png"]


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with sizes and times of change; links as links."""
    found = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(place, name))
            found[os.fsdecode(os.path.join(place, name))] = (status.st_size if name in files else 0, status.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images whose names do harm where they are not taken as names; and so is the folder's."""
    root = tmp_path_factory.mktemp("data") / "<script>x(1)<\n# owned `a` [b](c) | $d{$"
    generator = np.random.default_rng(0)
    for folder in (b"=cmd|' \x1b]0;x\x07\nclass", b"<img src=x onerror=alert(1)>"):
        place = os.path.join(os.fsencode(root), folder)
        os.makedirs(place)
        for name in HOSTILE:
            content = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(content, "PNG")
            Path(os.fsdecode(os.path.join(place, name))).write_bytes(content.getvalue())
        for name in BROKEN:
            Path(os.fsdecode(os.path.join(place, name))).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return root


@pytest.fixture(scope="module")
def trained(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on these images; it has left their folder, and all around its own, as it was."""
    place = tmp_path_factory.mktemp("runs")
    before = files_below(hostile.parent)
    sections = tiny(
        data={"train": str(hostile), "val": str(hostile)}, watch={"pictures": 16}, training={"epochs": 1},
    )  # fmt: skip
    pretrain(**sections, config="xtra_cifar10", out=place / "run")
    assert files_below(hostile.parent) == before
    assert [path.name for path in place.iterdir()] == ["run"]
    return place / "run"


def names_of(folder: Path) -> set[str]:
    source = open_source(folder)
    return {source.name(index) for index in range(len(source))}


def test_a_run_on_hostile_names_keeps_them_in_their_cells(trained: Path, hostile: Path) -> None:
    with open(trained / "bad_samples.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    expected = {name for name in names_of(hostile) if "broken" in name}
    assert {row["name"] for row in rows} <= expected
    assert rows
    assert all(row["position"].isdigit() and set(row) == {"name", "reason", "position"} for row in rows)
    for row in read_metrics(trained / "metrics.csv"):
        assert all(float(value) >= 0 for name, value in row.items() if value and name != "val_loss")
    assert list(trained.glob("figures/reconstructions-*.png"))


def test_a_resumed_run_knows_its_broken_images_by_these_names(trained: Path, hostile: Path) -> None:
    before = (trained / "bad_samples.csv").read_bytes()
    pretrain(resume=trained, quiet=True)
    assert (trained / "bad_samples.csv").read_bytes() == before


def inside(lines: str) -> list[str]:
    """The lines of a card that begin with a name out of the data."""
    return [line for line in lines.splitlines() if line.startswith(("- data:", "- from:"))]


def test_the_model_card_shows_names_and_does_nothing_else(trained: Path) -> None:
    card = (trained / "exported" / "README.md").read_text(encoding="utf-8")
    (line,) = inside(card)
    assert "<" not in card
    assert "\n# owned" not in card
    assert "\\[b\\](c) \\| $d" in line
    assert "&lt;script&gt;" in line


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in (*HOSTILE, *BROKEN)])
def test_names_in_markdown(name: str) -> None:
    text = as_text(name)
    assert text.isprintable()
    assert not set("<>\n\r\x1b") & set(text)
    marks = [i for i, letter in enumerate(text) if letter in "`*[]|"]
    assert all(text[i - 1] == "\\" for i in marks)


def test_plain_names_are_plain_in_markdown() -> None:
    plain = "/data/my_images/set-2 (old): 1,281,167 image files, 1000 classes (first-level folders)"
    assert as_text(plain) == plain
    assert as_text("_a_ __init__ a_b") == "\\_a\\_ \\_\\_init\\_\\_ a_b"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_shows_names_and_does_nothing_else(trained: Path, hostile: Path, tmp_path: Path) -> None:
    made = visualize(
        run=trained, images=str(hostile), out=tmp_path / "page", count=12, neighbours=2, among=str(hostile), workers=0,
        quiet=True,
    )  # fmt: skip
    page = Page()
    page.feed(made.page.read_text(encoding="utf-8"))
    assert {"img", "figure", "style", "h1"} <= page.tags
    assert not {"script", "iframe", "a", "link", "form", "svg", "b"} & page.tags
    assert not [name for name in page.attributes if name.startswith("on") or name in ("href", "style")]
    assert all(path.parent == made.folder for path in made.folder.rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_predictions_keep_names_exact_and_tell_of_formulas(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is not changed: the file would no longer be found by it."""
    model = Classifier(XTRAConfig(**TINY["model"]), HeadConfig("linear", LayerMean(2, 2)), ("=1+1", "plain\n<b>"))
    torch.nn.init.normal_(model.head.weight)
    save_pretrained(tmp_path / "weights", model, Preprocessing((16, 16), resize_px=16).to_dict(), None)
    flat = Path(os.fsdecode(os.path.join(os.fsencode(hostile), b"<img src=x onerror=alert(1)>")))
    out = predict(run=tmp_path / "weights", images=flat, out=tmp_path / "p.csv", top=1, workers=0)
    assert isinstance(out, Path)
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))[1:]
    assert sorted(row[0] for row in rows) == sorted(names_of(flat) - {os.fsdecode(name) for name in BROKEN})
    assert {len(row) for row in rows} == {3}
    told = capsys.readouterr().out
    count = sum(row[0].startswith(FORMULA) or row[1].startswith(FORMULA) for row in rows)
    assert f"{count} rows hold a name that begins with = + - or @" in told
    assert "\x1b" not in told
    assert "<b>" not in (tmp_path / "weights" / "README.md").read_text()


@pytest.mark.parametrize("name", [b"$\\mathdefault{\\nonsense{$", b"$\\mathdefault{10^{x}}$", b"a$\\bad{$ mathdefault"])
def test_no_name_is_a_formula_on_a_picture(name: bytes, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    show_image(figure.subplots(), np.zeros((4, 4, 3), np.uint8), name.decode())
    assert save(figure, tmp_path / "drawn.png").is_file()


# --- links and tars


def test_links_in_an_image_folder_are_read_and_never_written(tmp_path: Path) -> None:
    """A link is the file or folder that it leads to, as with `ls`; one that leads back up is passed over."""
    outside = write_images(tmp_path / "outside", per_class=3)
    images = write_images(tmp_path / "images", per_class=3)
    (images / "left" / "linked.png").symlink_to(outside / "top" / "000.png")
    (images / "linked").symlink_to(outside / "left")
    (images / "left" / "up").symlink_to(images)
    (images / "left" / "self.png").symlink_to("self.png")
    (images / "left" / "gone.png").symlink_to("/nowhere/gone.png")
    (images / "top" / "device.png").symlink_to("/dev/zero")
    before = files_below(outside)
    source = open_source(images)
    names = {source.name(i) for i in range(len(source))}
    assert {"left/linked.png", "linked/000.png"} <= names
    assert len(names) == 6 + 1 + 3
    index = next(i for i in range(len(source)) if source.name(i) == "left/linked.png")
    assert source[index].content == (outside / "top" / "000.png").read_bytes()
    prepare(data=images, out=tmp_path / "prepared", workers=0, quiet=True)
    assert files_below(outside) == before


def test_tars_write_nothing_wherever_their_names_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    content, absolute = io.BytesIO(), tmp_path / "absolute.png"
    Image.new("RGB", (20, 20), "red").save(content, "PNG")
    with tarfile.open(tmp_path / "hostile.tar", "w") as tar:
        names = [
            "../up.png",
            "a/../../up2.png",
            str(absolute),
            "plain.png",
            "-rf.png",
            "=1.png",
            "new\nline.png",
        ]
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(content.getvalue())
            tar.addfile(entry, io.BytesIO(content.getvalue()))
        for name, kind in (
            ("to_etc.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("null.png", tarfile.CHRTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    source = open_source(tmp_path / "hostile.tar")
    assert {source.name(i) for i in range(len(source))} == {
        f"hostile.tar/{name}" for name in (str(absolute).lstrip("/"), "plain.png", "-rf.png", "=1.png", "new\nline.png")
    }
    prepare(data=str(tmp_path / "hostile.tar"), out=tmp_path / "prepared", workers=0, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "hostile.tar", "prepared"}
    assert {path.suffix for path in (tmp_path / "prepared").rglob("*")} <= {".json", ".bin", ".gz"}


def test_out_is_the_one_place_that_is_written_and_never_overwritten(trained: Path, tmp_path: Path) -> None:
    """Also where a link leads to something that is there."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious.txt").write_text("mine")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_text("mine")
    before = files_below(tmp_path)
    sections = tiny(data={"train": str(write_images(tmp_path / "images", 4))})
    before = files_below(tmp_path)
    for out in ("kept", "link", "file", "images/../kept"):
        assert cli.main(["pretrain", "--config", "xtra_cifar10", *flags(sections), "--out", str(tmp_path / out)]) == 1
    assert files_below(tmp_path) == before


# --- no pickle but the state of a run


def globals_of(stream: bytes) -> set[str]:
    return {
        str(argument)
        for step, argument, _ in pickletools.genops(stream)
        if step.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
    }


def pickles_in(file: Path) -> Mapping[str, bytes]:
    """Name -> content of what is a pickle in a file, or the file itself."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            every = {name: archive.read(name) for name in archive.namelist()}
        return {name: inner for name, inner in every.items() if name.endswith(".pkl") or inner[:1] == b"\x80"}
    return {file.name: content} if content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") else {}


def test_a_run_writes_no_pickle_but_its_state_which_holds_tensors_and_numbers(trained: Path) -> None:
    pickled = {}
    for file in trained.rglob("*"):
        if file.is_file() and (found := pickles_in(file)):
            pickled[file.relative_to(trained).parts[0]] = {file.name}
            for name, content in found.items():
                if name.endswith("data.pkl"):
                    allowed = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
                    names = {each for each in globals_of(content) if not each.endswith("Storage")}
                    assert names <= allowed, names
    assert pickled == {"checkpoints": {"state.pt"}}
    newest_checkpoint(trained / "checkpoints")  # reads it with weights_only
