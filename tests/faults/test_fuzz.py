"""Random values and damaged files: what comes of them works, or is refused in words.

`NEXTBLOCK_FUZZ=long pytest tests/faults/test_fuzz.py` tries 2,000 of each instead of 25, drawn anew every time.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import tarfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nextblock.checkpoints.pretrained import load_pretrained, save_pretrained
from nextblock.data.latents.cache import About as LatentsAbout
from nextblock.data.latents.cache import open_latents
from nextblock.data.latents.shards import write_shard
from nextblock.data.prepared.source import open_prepared
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import explain_change, open_source, write_manifest
from nextblock.errors import ConfigError, NextblockError
from nextblock.evaluation.image_sets import open_image_set
from nextblock.jobs.prepare import prepare
from nextblock.jobs.probe_report import read_result
from nextblock.mask import block_causal_mask, teacher_forcing_mask
from nextblock.ordering import RESIZES, Ordering, ScalePyramid
from nextblock.recipes.config import PRETRAIN, Kind, PretrainConfig, kinds, read_recipe, to_yaml, typed_as
from nextblock.training.checkpoint import read_checkpoint, save_checkpoint
from nextblock.training.config import TrainingConfig
from nextblock.training.plan import Plan
from nextblock.training.run_record import read_config
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_generator import TINY as TINY_XAR
from tiny_run import TINY, write_images
from victims import digest_of

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile(
    "nextblock-quick", max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=_SLOW
)
settings.register_profile(
    "nextblock-long", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_SLOW
)
FUZZ = settings.get_profile("nextblock-long" if os.environ.get("NEXTBLOCK_FUZZ") == "long" else "nextblock-quick")
SMALL = 64  # sizes of models that are made

# --- configurations

INTEGERS = st.integers(-2, 20) | st.sampled_from([0, 1, 2, 4, 8, 16, 24, 32, 10**6, 10**9 + 7, 2**40])
FLOATS = st.floats() | st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["null", "12", "~", "a: b", "\x85", "[1]", "\udcff", "yes", "#x", "hf:a/b"]
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, sensible and not."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from([*inner, "another"])
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, inner))
    if origin is tuple and inner[-1] is Ellipsis:
        return st.lists(values_of(inner[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, inner))
    return {int: INTEGERS, float: FLOATS, bool: st.booleans(), str: TEXTS, type(None): st.none()}[hint]


def changes_of(config: type) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a configuration, with values of their types."""
    fields = {name: values_of(hint) for name, hint in typing.get_type_hints(config).items()}
    names = st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen}))


def made(config: type, base: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The object, or None where it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is nothing to normalise
            return config(**base | changes)
    except ConfigError:
        return None


def is_small(config: XTRAConfig | XAR | Any) -> bool:
    """Whether a model of it is made in no time."""
    numbers = [v for v in vars(config).values() if isinstance(v, int)]
    numbers += [n for v in vars(config).values() if isinstance(v, tuple) for n in v if isinstance(n, int)]
    return max(numbers, default=0) <= SMALL and config.mlp_ratio <= 8


@FUZZ
@given(changes=changes_of(XTRAConfig))
def test_an_encoder_of_any_sizes_works_or_is_refused(changes: dict[str, Any]) -> None:
    config = made(XTRAConfig, TINY["model"], changes)
    if config is None:
        return
    assert XTRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if is_small(config):
        model = XTRA(config)
        images = torch.rand(1, config.channels, *config.image)
        assert torch.isfinite(model.loss(images))


@FUZZ
@given(changes=changes_of(XARConfig))
def test_a_generator_of_any_sizes_works_or_is_refused(changes: dict[str, Any]) -> None:
    config = made(XARConfig, TINY_XAR["model"], changes)
    if config is None:
        return
    assert XARConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if is_small(config):
        model = XAR(config)
        latents = torch.rand(1, config.latent_channels, *config.latent)
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        assert torch.isfinite(model.loss(latents, labels))


@FUZZ
@given(changes=changes_of(TrainingConfig), length=st.integers(1, 10**7), world=st.integers(1, 9))
def test_a_training_of_any_settings_has_a_plan_or_is_refused(changes: dict[str, Any], length: int, world: int) -> None:
    config = made(TrainingConfig, {}, changes)
    if config is None:
        return
    try:
        plan = Plan(length, config, world - 1, world)
    except ConfigError:
        return
    steps = plan.total_steps
    assert steps >= 1
    for step in {0, steps // 2, steps - 1}:
        assert 0 <= plan.lr(step) < math.inf
    if config.batch_size < 1000:
        assert all(0 <= position < config.batch_size for part in plan.micro_batches(0) for position in part)


JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def sections_of(kind: Kind[Any]) -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    """One key of each section at most: of its type, or anything."""

    def one(config: type) -> st.SearchStrategy[dict[str, Any]]:
        hints = typing.get_type_hints(config)
        return st.sampled_from(sorted(hints)).flatmap(
            lambda name: st.fixed_dictionaries({name: values_of(hints[name]) | JSON})
        )

    return st.fixed_dictionaries({}, optional={name: one(config) for name, config in kind.sections.items()})


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.verb)
@FUZZ
@given(data=st.data())
def test_a_recipe_of_any_values_is_refused_or_survives_a_file(
    kind: Kind[Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = typed_as(kind, data.draw(sections_of(kind)))
    except ConfigError:
        return
    file = tmp_path_factory.getbasetemp() / f"{kind.verb}.yaml"
    file.write_text(to_yaml(config, "a\nheader \x85 # of lines"), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = typed_as(kind, read_recipe(file, kind))
    assert repr(again) == repr(config)  # by letters: nan is not equal to itself
    if isinstance(config, PretrainConfig):
        for make in (config.data.preprocessing, config.data.crop):
            with suppress(ConfigError):
                make(config.model)


# --- orderings

SIDES = st.integers(1, 6)


@st.composite
def orderings(draw: st.DrawFn) -> Ordering:
    """Any partition of a grid, in any order."""
    size, times = (draw(st.tuples(st.integers(1, 3), st.integers(1, 4))) for _ in range(2))
    grid = size[0] * times[0], size[1] * times[1]
    kind: Literal["cells", "subsamples"] = draw(st.sampled_from(("cells", "subsamples")))
    plain = Ordering(kind, grid, size)
    return plain.permuted(draw(st.permutations(range(plain.num_entities)))) if draw(st.booleans()) else plain


@FUZZ
@given(ordering=orderings(), random=st.randoms(use_true_random=False))
def test_splitting_and_merging_are_inverse_in_any_order(ordering: Ordering, random: Any) -> None:
    x = torch.arange(2 * ordering.num_patches * 3).view(2, *ordering.grid, 3)
    sequence = ordering.split(x)
    assert torch.equal(ordering.merge(sequence), x)
    assert torch.equal(ordering.split(ordering.merge(sequence)), sequence)
    assert sorted(ordering.sequence.tolist()) == list(range(ordering.num_patches))
    assert torch.equal(ordering.sequence[ordering.inverse], torch.arange(ordering.num_patches))
    assert torch.equal(ordering.positions[:, 0] * ordering.grid[1] + ordering.positions[:, 1], ordering.sequence)
    assert Ordering.from_json(ordering.to_json()) == ordering
    places = list(range(ordering.num_entities))
    random.shuffle(places)
    undo = sorted(range(len(places)), key=places.__getitem__)
    assert ordering.permuted(places).permuted(undo) == ordering


def require_causal(entity: torch.Tensor) -> None:
    """Who sees one that sees a third sees the third; everybody sees itself and its entity; nobody a later one."""
    mask = block_causal_mask(entity)
    reach = (mask.double() @ mask.double()) > 0
    assert not (reach & ~mask).any(), "not transitive"
    assert mask.diagonal().all()
    assert torch.equal(mask & mask.T, entity[:, None] == entity[None, :])
    assert not mask[entity[:, None] < entity[None, :]].any()
    forced = teacher_forcing_mask(entity)
    n = len(entity)
    assert torch.equal(forced[:n, :n], mask)
    assert not forced[:n, n:].any(), "a clean token sees a noisy one"
    assert not (forced[n:, :n] & (entity[:, None] == entity[None, :])).any(), "a noisy entity sees itself clean"


@FUZZ
@given(ordering=orderings())
def test_masks_are_causal_whatever_the_entities(ordering: Ordering) -> None:
    require_causal(ordering.entity)


@FUZZ
@given(
    grid=st.tuples(SIDES, SIDES), scales=st.lists(st.tuples(SIDES, SIDES), max_size=4), resize=st.sampled_from(RESIZES)
)
def test_a_pyramid_of_any_scales_works_or_is_refused(grid: Any, scales: Any, resize: Any) -> None:
    for given_scales in ((), (*sorted(scales), grid)):
        try:
            pyramid = ScalePyramid(grid, given_scales, resize)
        except ConfigError:
            assert given_scales, "halvings are always scales"
            continue
        x = torch.rand(2, *grid, 3)
        sequence = pyramid.split(x)
        assert sequence.shape == (2, pyramid.num_tokens, 3)
        assert torch.equal(pyramid.merge(sequence), x)
        assert ScalePyramid.from_dict(json.loads(json.dumps(pyramid.to_dict()))) == pyramid
        assert (pyramid.positions > -1).all()
        require_causal(pyramid.entity)


# --- files

Edit = tuple[str, float, bytes, int]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "put", "insert", "delete", "cut", "twice", "leaf", "leaf")),
        st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6), st.integers(1, 64),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def edited(content: bytes, edits: list[Edit], leaf: Any) -> bytes:
    """Damage by accident, or, where the file is JSON, another value in place of one of its own."""
    for how, where, put, length in edits:
        at = int(where * len(content))
        if how == "leaf":
            content = _with_leaf(content, where, leaf)
        elif how == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
        else:
            middle = {"put": put, "insert": put + content[at:], "delete": b"", "twice": content[at:] * 2, "cut": b""}
            rest = {"put": content[at + len(put) :], "delete": content[at + length :]}
            content = content[:at] + middle.get(how, b"") + rest.get(how, b"")
    return content


def _with_leaf(content: bytes, where: float, leaf: Any) -> bytes:
    """One value anywhere in a JSON text replaced; what is no JSON is left as it is."""
    try:
        values = json.loads(content)
    except ValueError:
        return content
    places = list(_places(values))
    if places:
        holder, name = places[int(where * len(places))]
        holder[name] = leaf
    return json.dumps(values).encode()


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for name in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield values, name
        yield from _places(values[name])


@dataclass(frozen=True)
class Parsed:
    """A file of ours. read: its content, as anybody gets it, to be compared. checked: a change of it must be noticed;
    otherwise what is read may differ, as a file says it, but must be of use."""

    file: Path
    read: Callable[[], Any]
    checked: bool = True


def _checkpoint(folder: Path, name: str) -> Parsed:
    torch.manual_seed(0)
    state = {"model": {"w": torch.randn(50)}, "step": 8, "meters": {"loss": torch.zeros(())}}
    path = save_checkpoint(folder / "checkpoints", 8, state, 1)
    return Parsed(path / name, lambda: digest_of(read_checkpoint(path)))


def _latents(folder: Path, name: str) -> Parsed:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    moments = generator.normal(size=(3, 2, 4, 2, 2)).astype(np.float32)
    record = write_shard(folder, 0, moments, np.array([0, 1, -1]), ["a", "b", "c"], [])
    preprocessing = Preprocessing((16, 16), resize_px=16, mean=(0.5,) * 3, std=(0.5,) * 3).to_dict()
    vae = {"kind": "kl", "sha256": "0" * 64, "latent_channels": 2, "scale_factor": 1.0}
    data = {"description": "d", "count": 3, "bytes": 3, "sha256": "1" * 64, "order_sha256": "2" * 64}
    LatentsAbout(
        vae, "adm_center", preprocessing, data, ["x", "y"], (4, 2, 2), "float32", 3, finished=True, shards={0: record}
    ).write(folder)

    def read() -> Any:
        found = open_latents(folder)
        every = np.arange(len(found))
        values = [found.moments(every, [flip] * len(found)).tobytes() for flip in (False, True)]
        return values, found.labels.tolist(), [found.name(i) for i in range(len(found))], found.classes, found.vae

    return Parsed(folder / name, read)


def _prepared(folder: Path, name: str) -> Parsed:
    made = prepare(
        data=write_images(folder / "images", per_class=2), out=folder / "made", format="png", workers=0, quiet=True
    )  # fmt: skip

    def read() -> Any:
        found = open_prepared(made)
        return [(found[i], found.name(i)) for i in range(len(found))], found.classes

    return Parsed(made / name, read)


def _tar_index(folder: Path) -> Parsed:
    """Its cache is made anew where it is damaged: what is read is always the same."""
    folder.mkdir()
    os.environ["NEXTBLOCK_CACHE"] = str(folder / "cache")  # put back by the fixture
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, inner in (
            ("a.png", content.getvalue()),
            ("a.cls", b"3"),
            ("b.png", content.getvalue()),
            ("b.cls", b"1"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(inner)
            tar.addfile(entry, io.BytesIO(inner))

    def read() -> Any:
        found = open_source(folder / "x.tar")
        labels = found.labels()
        samples = [(found[i], found.name(i)) for i in range(len(found))]
        return samples, found.description, None if labels is None else labels.tolist(), list(found.manifest())

    read()
    (index,) = (folder / "cache" / "tars").glob("*.index")
    return Parsed(index, read)


def _manifest(folder: Path) -> Parsed:
    source = open_source(write_images(folder / "images", per_class=3))
    write_manifest(source, folder / "manifest.gz")
    return Parsed(folder / "manifest.gz", lambda: explain_change(folder / "manifest.gz", source), checked=False)


def _recipe(folder: Path) -> Parsed:
    folder.mkdir()
    (folder / "x.yaml").write_text(to_yaml(typed_as(PRETRAIN, TINY)))

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            typed_as(PRETRAIN, read_recipe(folder / "x.yaml"))

    return Parsed(folder / "x.yaml", read, checked=False)


def _run_config(folder: Path) -> Parsed:
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(typed_as(PRETRAIN, TINY)))
    return Parsed(folder / "config.yaml", lambda: dict(read_config(folder)), checked=False)


def _result(folder: Path) -> Parsed:
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"dataset": "d", "rows": [{"lr": 1.0}], "best": {"head": 0}}))

    def read() -> None:
        found = read_result(folder)
        assert found is not None
        assert {"dataset", "rows", "best"} <= found.keys()

    return Parsed(folder / "result.json", read, checked=False)


def _samples(folder: Path, save: Callable[..., None]) -> Parsed:
    """Mapped into memory, not read: what a pixel was nobody says, so that it is not checked."""
    folder.mkdir()
    save(folder / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))

    def read() -> None:
        found = open_image_set(str(folder / "x.npz"), scratch=folder).source
        if found is not None:
            assert all(found[i].content.dtype == np.uint8 for i in range(len(found)))

    return Parsed(folder / "x.npz", read, checked=False)


def _statistics(folder: Path) -> Parsed:
    folder.mkdir()
    np.savez(folder / "x.npz", mu=np.zeros(3), sigma=np.eye(3), n=np.int64(9), about=np.array("{}"))
    return Parsed(
        folder / "x.npz", lambda: open_image_set(str(folder / "x.npz"), scratch=folder) and None, checked=False
    )


def _weights(folder: Path, name: str) -> Parsed:
    torch.manual_seed(0)
    save_pretrained(folder, XTRA(XTRAConfig(**TINY["model"])), Preprocessing((16, 16)).to_dict(), None)

    def read() -> Any:
        model, preprocessing = load_pretrained(folder)
        return digest_of([model.state_dict(), model.config.to_dict(), Preprocessing.from_dict(preprocessing).to_dict()])

    return Parsed(folder / name, read)


FILES: dict[str, Callable[[Path], Parsed]] = {
    "checkpoint.json": lambda folder: _checkpoint(folder, "checkpoint.json"),
    "state.pt": lambda folder: _checkpoint(folder, "state.pt"),
    "latents.json": lambda folder: _latents(folder, "latents.json"),
    "a shard of latents": lambda folder: _latents(folder, "shard-00000.safetensors"),
    "prepared.json": lambda folder: _prepared(folder, "prepared.json"),
    "index of prepared images": lambda folder: _prepared(folder, "index.bin"),
    "a shard of prepared images": lambda folder: _prepared(folder, "shard-00000.bin"),
    "index of a tar": _tar_index,
    "manifest": _manifest,
    "recipe": _recipe,
    "config.yaml": _run_config,
    "result.json": _result,
    "samples": lambda folder: _samples(folder, np.savez),
    "packed samples": lambda folder: _samples(folder, np.savez_compressed),
    "statistics": _statistics,
    "model.safetensors": lambda folder: _weights(folder, "model.safetensors"),
    "config.json": lambda folder: _weights(folder, "config.json"),
    "preprocessor_config.json": lambda folder: _weights(folder, "preprocessor_config.json"),
}


@pytest.fixture(scope="module", params=list(FILES))
def parsed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parsed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTBLOCK_CACHE", "")
        yield FILES[request.param](tmp_path_factory.mktemp("fuzz") / "made")


@FUZZ
@given(edits=EDITS, leaf=JSON)
def test_a_damaged_file_is_refused_in_words_or_says_the_same(parsed: Parsed, edits: list[Edit], leaf: Any) -> None:
    whole, content = parsed.read(), parsed.file.read_bytes()
    try:
        parsed.file.write_bytes(edited(content, edits, leaf))
        try:
            found = parsed.read()
        except NextblockError:
            pass
        else:
            assert found == whole or not parsed.checked
    finally:
        parsed.file.write_bytes(content)


READERS: dict[str, Callable[[Path], object]] = {
    "recipe": read_recipe,
    "config.yaml of a run": lambda file: read_config(file.parent),
}
NO_YAML = [
    "data: {train: 2001-99-99}", "data: {train: !!timestamp x}", "training: {seed: !!int ''}", "training: {seed: 0x_}",
    "training: {lr: !!float x}", "training: {lr: !!bool x}", f"training: {{seed: {'9' * 5000}}}", "a: !!binary é", "[1",
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", NO_YAML)
def test_values_that_yaml_itself_cannot_make(reader: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(NextblockError):
        READERS[reader](tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["1: {a: 1}", "data: {1: 2}", "data: {flip: null}", "training: {lr: }"])
def test_keys_and_values_that_no_recipe_has(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError):
        typed_as(PRETRAIN, read_recipe(tmp_path / "x.yaml"))


def test_damage_that_is_not_noticed_would_fail(tmp_path: Path) -> None:
    """Of the test above: a reader without a check, and one without words."""
    (tmp_path / "x.json").write_text('{"a": 1}')
    plain = Parsed(tmp_path / "x.json", lambda: json.loads((tmp_path / "x.json").read_text()))
    check = test_a_damaged_file_is_refused_in_words_or_says_the_same.hypothesis.inner_test
    with pytest.raises(AssertionError):
        check(plain, [("leaf", 0.0, b"x", 1)], 2)
    with pytest.raises(ValueError):
        check(plain, [("cut", 0.5, b"x", 1)], 2)
    assert (tmp_path / "x.json").read_text() == '{"a": 1}'


def test_every_field_of_a_configuration_is_drawn() -> None:
    for config in (XTRAConfig, XARConfig, TrainingConfig, *(c for kind in kinds() for c in kind.sections.values())):
        assert set(typing.get_type_hints(config)) == {field.name for field in dataclasses.fields(config)}
        assert all(values_of(hint) is not None for hint in typing.get_type_hints(config).values())
