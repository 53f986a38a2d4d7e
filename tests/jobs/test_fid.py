"""Two sets of images, judged."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.decode import decode
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.evaluation import extractors, feature_rows
from nextblock.evaluation.frechet import frechet_distance, statistics
from nextblock.evaluation.generation import compare, inception_score, real_against_real
from nextblock.jobs import fid_run
from nextblock.jobs.embed import Embedded, embed
from nextblock.jobs.fid import fid
from nextblock.jobs.sample_folder import SampleFolder

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def noise(count: int, seed: int, size: int = 6, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, size, size, 3), dtype=np.uint8)


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is called as Inception is, with 16 features."""

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.register_buffer("a", torch.randn(48, 16, generator=generator))
            self.register_buffer("b", torch.randn(16, 10, generator=generator) / 10)

        def forward(
            self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
        ) -> torch.Tensor:
            x = torch.nn.functional.interpolate(img.float() / 128 - 1, size=(4, 4)).flatten(1)
            features = torch.relu(x @ self.a)
            if return_features:
                return features
            return (features @ self.b).softmax(1)

    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        torch.jit.script(Tiny()).save(str(path))
    return path


@pytest.fixture
def inception(script: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same file, and its width taken for Inception's: matrices of 2,048 cost a test half a minute."""
    monkeypatch.setattr(extractors, "FID_WIDTH", 16)
    return script


def trusted(path: Path) -> dict[str, Any]:
    """The arguments by which a person says that the file may be loaded."""
    return {"inception": path, "inception_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_the_inception_file_is_a_program_that_must_be_trusted_by_its_hash(script: Path) -> None:
    digest = trusted(script)["inception_sha256"]
    with pytest.raises(ConfigError, match=f"runs code from it.*--inception_sha256 {digest}"):
        fid(samples=noise(12, 0), reference=noise(14, 1), inception=script, workers=0, quiet=True)


def test_arrays_in_pixels_are_what_compare_gives(capsys: pytest.CaptureFixture[str]) -> None:
    samples, reference = noise(260, 0, low=60), noise(300, 1)
    found = fid(samples=samples, reference=reference, pixels=True, workers=0, batch_size=37)
    expected = compare(flat(samples), flat(reference))
    for name in ("frechet", "kid", "precision", "recall"):
        assert found.results[name] == pytest.approx(expected[name], rel=1e-6), name
    assert found.frechet == found.results["frechet"]
    assert found.results["frechet_counts"] == [260, 300]
    floor = real_against_real(flat(reference))
    assert floor is not None
    assert found.floor is not None
    assert found.floor["frechet"] == pytest.approx(floor["frechet"], rel=1e-6)
    assert found.floor["counts"] == [150, 150]
    assert found.inception_score is None
    told = " ".join(capsys.readouterr().out.split())
    assert "FID" not in told
    for words in ("260 to 300", "150 to 150", "raw pixels, 6 x 6 x 3, 108 dimensions", "floor", "too high rather"):
        assert words in told
    assert "singular" not in told


def test_fewer_images_than_dimensions_and_more_than_one_size_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(noise(9, 1, size=12)):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no")
    found = fid(samples=noise(20, 0), reference=str(folder), pixels=True, workers=0, quiet=True)
    assert found.size_px == (6, 6)
    assert (found.reference.images, found.reference.left_out, found.reference.of_another_size) == (9, 1, 9)
    notes = "\n".join(found.notes)
    few = fid(samples=noise(10, 0), reference=noise(40, 1), pixels=True, workers=0, quiet=True)
    assert any("for 10 samples this floor is too low" in note for note in few.notes)
    assert "20 samples in 108 dimensions: their covariance is singular" in notes
    assert "9 reference images in 108" in notes
    assert "9 of the 9 reference images are not 6 x 6 pixels" in notes
    smaller = fid(samples=noise(20, 0), reference=str(folder), pixels=True, size_px=2, workers=0, quiet=True)
    assert smaller.results["dimensions"] == 12
    assert smaller.samples.of_another_size == 20


def test_with_inception_weights_it_is_fid(inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, reference = noise(12, 0), noise(14, 1)
    np.savez(tmp_path / "samples.npz", samples)
    out = tmp_path / "judged"
    found = fid(samples=tmp_path / "samples.npz", reference=reference, **trusted(inception), out=out, workers=0)
    model = torch.jit.load(inception)  # type: ignore[no-untyped-call]
    a, b = (model(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True).numpy() for x in (samples, reference))
    assert found.metric == "FID"
    assert found.frechet == pytest.approx(frechet_distance(statistics(a), statistics(b)), rel=1e-4)
    probabilities = model(torch.from_numpy(samples).permute(0, 3, 1, 2), no_output_bias=True).numpy()
    assert found.inception_score is not None
    assert found.inception_score["mean"] == pytest.approx(inception_score(probabilities)[0], rel=1e-5)
    told = " ".join(capsys.readouterr().out.split())
    assert "FID" in told
    assert found.features["sha256"][:16] in told
    assert "Inception score of the 12 samples" in told
    stored = json.loads((out / "fid.json").read_text())
    assert stored["results"] == found.results
    assert stored["features"]["path"] == str(inception)
    assert stored["environment"]["packages"]["torch"]
    assert stored["samples"]["images"] == 12
    assert [path.name for path in out.iterdir()] == ["fid.json"]  # the features are gone
    with pytest.raises(RunError, match="ever overwritten"):
        fid(samples=samples, reference=reference, pixels=True, out=out, quiet=True)


def test_a_file_of_another_width_is_not_called_fid(script: Path) -> None:
    found = fid(samples=noise(12, 0), reference=noise(14, 1), **trusted(script), workers=0, quiet=True)
    assert found.metric == "Fréchet distance"


def test_an_encoders_distance_is_never_called_fid(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fid(samples=str(images / "top"), reference=str(images), encoder=run, workers=0, out=tmp_path / "judged")
    features = embed(run=run, images=str(images), quiet=True)
    assert isinstance(features, Embedded)
    top = np.array([name.startswith("top") for name in features.names])
    expected = frechet_distance(statistics(features.features[top]), statistics(features.features))
    assert found.frechet == pytest.approx(expected, rel=1e-4)
    assert found.metric == "Fréchet distance"
    assert found.inception_score is None
    assert found.features["kind"] == "encoder"
    assert found.features["preprocessing"]["size_px"] == [16, 16]
    told = capsys.readouterr().out
    assert f"features of {run}, weights {found.features['sha256'][:16]}" in told
    assert "FID" not in told
    assert "FID" not in (tmp_path / "judged" / "fid.json").read_text()


def test_statistics_are_kept_and_compared(inception: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, reference, kept = noise(120, 0), noise(130, 1, low=20), tmp_path / "reference.npz"
    whole = fid(samples=samples, reference=reference, pixels=True, save_stats=kept, workers=0, quiet=True)
    again = fid(samples=samples, reference=kept, pixels=True, workers=0)
    assert again.frechet == pytest.approx(whole.frechet, rel=1e-12)
    assert again.results["frechet_counts"] == [120, 130]
    assert again.floor is None
    assert "kid" not in again.results
    told = capsys.readouterr().out
    assert "No floor" in told
    assert "120 to 130" in told
    with np.load(kept) as file:
        assert file["mu"].shape == (108,)
        assert int(file["n"]) == 130
    both = fid(samples=kept, reference=str(kept), quiet=True)
    assert both.frechet == pytest.approx(0, abs=1e-10)
    assert both.features["kind"] == "pixels"
    with pytest.raises(ConfigError, match="statistics of other features: channels 3 there, None here"):
        fid(samples=samples, reference=kept, **trusted(inception), workers=0, quiet=True)
    with pytest.raises(ConfigError, match="leave out --pixels"):
        fid(samples=kept, reference=kept, pixels=True, quiet=True)
    with pytest.raises(ConfigError, match="this reference is statistics"):
        fid(samples=samples, reference=kept, pixels=True, save_stats=tmp_path / "b.npz", quiet=True)
    with pytest.raises(RunError, match="not overwritten"):
        fid(samples=samples, reference=samples, pixels=True, save_stats=kept, quiet=True)


def test_statistics_of_unknown_features(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, mu=np.zeros(108), sigma=np.eye(108))
    found = fid(samples=noise(120, 0), reference=path, pixels=True, workers=0, quiet=True)
    assert found.results["frechet_counts"] == [120, None]
    assert any("do not say of which features" in note for note in found.notes)
    np.savez(path, mu=np.zeros(10), sigma=np.eye(10))
    with pytest.raises(ConfigError, match="108 dimensions, the other of 10"):
        fid(samples=noise(120, 0), reference=path, pixels=True, workers=0, quiet=True)


def test_a_reference_with_images_and_inception_statistics(inception: Path, tmp_path: Path) -> None:
    """As ADM's files: the Fréchet distance is of the statistics, the rest of the images."""
    reference, path = noise(14, 1), tmp_path / "both.npz"
    mean, covariance = np.random.default_rng(0).normal(size=16), np.eye(16)
    np.savez(path, reference, mu=mean, sigma=covariance)
    found = fid(samples=noise(12, 0), reference=path, **trusted(inception), workers=0, quiet=True)
    plain = fid(samples=noise(12, 0), reference=reference, **trusted(inception), workers=0, quiet=True)
    assert found.frechet != pytest.approx(plain.frechet, rel=0.01)
    assert found.results["frechet_counts"] == [12, None]
    for name in ("kid", "precision", "recall", "counts"):
        assert found.results[name] == plain.results[name]
    assert found.floor == plain.floor
    np.savez(path, reference, mu=np.zeros(108), sigma=np.eye(108))  # of the width of the pixels, by chance
    pixels = fid(samples=noise(12, 0), reference=path, pixels=True, workers=0, quiet=True)
    assert pixels.results["frechet_counts"] == [12, 14]
    assert any("Only the images are used" in note for note in pixels.notes)


def test_metrics_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = noise(40, 0), noise(50, 1)
    given = {"samples": x, "reference": y, "pixels": True, "workers": 0}
    everything = fid(**given, quiet=True)
    found = fid(**given, metrics="frechet, kid")
    assert {"frechet", "kid"} <= set(found.results)
    assert not {"precision", "recall", "precision_counts"} & {*found.results, *(found.floor or {})}
    assert found.frechet == everything.frechet
    told = capsys.readouterr().out
    assert "KID" in told
    assert "precision" not in told
    only = fid(**given, metrics="precision_recall", out=tmp_path / "judged")
    assert only.frechet is None
    assert only.results["precision"] == everything.results["precision"]
    told = " ".join(capsys.readouterr().out.split())
    assert "40 to 50" in told
    assert "Fréchet" not in told
    computed = json.loads((tmp_path / "judged" / "fid.json").read_text())["computed"]
    assert set(computed) == {"precision", "recall", "floor"}


def test_metrics_that_cannot_be_are_told(script: Path, tmp_path: Path) -> None:
    x = noise(10, 0)

    def refused(metrics: str, told: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=told):
            fid(**{"samples": x, "reference": x, "pixels": True, "quiet": True, "metrics": metrics, **changes})

    refused("frechet,kdi", r"no metric is named 'kdi'\. Did you mean 'kid'\?")
    refused("frechet,precision", "Did you mean 'precision_recall'")
    refused("", "no metric is named ''")
    refused("inception_score", "the Inception score needs the classes of --inception")
    refused("inception_score", "knows no reference", pixels=False, **trusted(script))
    refused("frechet", "precision_count must be 0 .* or more than 3; got 3", precision_count=3)
    kept = tmp_path / "kept.npz"
    fid(samples=x, reference=x, pixels=True, metrics="kid", save_stats=kept, workers=0, quiet=True)
    refused("frechet,kid", "kid needs images of both sets, and the reference is statistics", reference=kept)
    assert fid(samples=x, reference=kept, pixels=True, metrics="frechet", workers=0, quiet=True).frechet < 1e-9


def test_the_inception_score_can_be_left_out(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"samples": noise(12, 0), "reference": noise(14, 1), "workers": 0, "quiet": True, **trusted(inception)}
    assert fid(**given, metrics="frechet,inception_score").inception_score is not None
    passes: list[bool] = []
    call = extractors.InceptionFile.probabilities
    count = lambda self, images: passes.append(True) or call(self, images)  # noqa: E731
    monkeypatch.setattr(extractors.InceptionFile, "probabilities", count)
    assert fid(**given, metrics="frechet").inception_score is None
    assert len(passes) == 1  # to see what the file is; none over the samples


def test_precision_and_recall_of_many_images_are_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = noise(60, 0, low=60), noise(90, 1)
    found = fid(samples=x, reference=y, pixels=True, precision_count=40, workers=0, out=tmp_path / "judged")
    expected = compare(flat(x), flat(y), precision_count=40)
    for name in ("precision", "recall", "precision_counts"):
        assert found.results[name] == expected[name]
    assert found.results["precision_counts"] == [40, 40]
    assert found.floor is not None
    assert found.floor["precision_counts"] == [40, 40]
    told = " ".join(capsys.readouterr().out.split())
    assert "Precision and recall are of 40 of the 60 samples and 40 of the 90 reference images" in told
    stored = json.loads((tmp_path / "judged" / "fid.json").read_text())
    assert stored["results"]["precision_counts"] == [40, 40]
    assert any("--precision_count" in note for note in stored["notes"])
    whole = fid(samples=x, reference=y, pixels=True, precision_count=0, workers=0, quiet=True)
    assert whole.results["precision"] == compare(flat(x), flat(y))["precision"]
    assert not any("Precision and recall are of" in note for note in whole.notes)


def test_long_computations_are_told_before_they_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"samples": noise(20, 0), "reference": noise(20, 1), "pixels": True, "workers": 0}
    fid(**given)
    assert "will take" not in capsys.readouterr().out
    monkeypatch.setattr(fid_run, "expected_seconds", lambda pairs, width, **_: 90.0 * sum(map(sum, pairs)))
    fid(**given)
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("precision and recall will take about 1.5 h (20 to 20 images, the floor 10 to 10")
    assert "--metrics frechet,kid leaves them out" in told
    fid(**given, metrics="frechet,kid")
    assert "will take" not in capsys.readouterr().out


def test_a_folder_of_nextblock_sample_is_judged_by_its_images(tmp_path: Path) -> None:
    folder, images = SampleFolder(tmp_path / "samples", 30), noise(30, 0)
    folder.claim({"settings": {}, "source": {}})
    for number, image in enumerate(images):
        folder.write_all({number: image})
    for path in (folder.sheet, folder.animation):
        Image.fromarray(noise(1, 5, size=50)[0]).save(path)
    found = fid(samples=folder.path, reference=images, pixels=True, workers=0, quiet=True)
    assert found.samples.images == 30
    assert found.samples.of_another_size == 0
    assert found.frechet == pytest.approx(0, abs=1e-12)


def test_a_run_is_no_set_of_images(run: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match=r"is the folder of a run, not of images.*nextblock sample"):
        fid(samples=run, reference=str(images), encoder=run, quiet=True)


class Drawn:
    """So many images, made when they are asked for."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= self.count:
            raise IndexError
        return noise(1, 100_000 * self.seed + index, size=8)[0]


def test_many_images_need_little_more_memory_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 2,000 more in each set have 0.8 MB, their features in float64 6 MB."""
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 128)

    def peak(count: int) -> float:
        sets = {"samples": Drawn(count, 0), "reference": Drawn(count, 1)}
        tracemalloc.start()
        fid(**sets, pixels=True, metrics="frechet", batch_size=32, workers=0, quiet=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most / 1e6

    peak(300)  # what is imported and kept
    assert peak(2300) < peak(300) + 0.5


def test_count_draws_images_by_seed() -> None:
    numbered = np.repeat(np.arange(200, dtype=np.uint8), 4 * 4).reshape(200, 4, 4)  # gray
    a, b, c = (
        fid(samples=numbered, reference=numbered, pixels=True, count=50, seed=seed, workers=0, quiet=True)
        for seed in (0, 0, 1)
    )
    assert a.results == b.results != c.results
    assert a.results["counts"] == [50, 50]
    assert a.results["dimensions"] == 16  # gray stays gray
    assert a.frechet > 0  # the two draws differ
    assert a.samples.what.startswith("50 of 200 images")


def test_bad_input_is_told(run: Path, tmp_path: Path) -> None:
    x = noise(10, 0)
    with pytest.raises(ConfigError, match=r"In which features.*samples and the reference are images"):
        fid(samples=x, reference=x, quiet=True)
    with pytest.raises(ConfigError, match="one kind of features at a time; got --encoder and --pixels"):
        fid(samples=x, reference=x, pixels=True, encoder=run, quiet=True)
    with pytest.raises(ConfigError, match="an encoder has its own preprocessing"):
        fid(samples=x, reference=x, encoder=run, size_px=8, quiet=True)
    with pytest.raises(ConfigError, match=r"must end in \.npz"):
        fid(samples=x, reference=x, pixels=True, save_stats=tmp_path / "s.csv", quiet=True)
    with pytest.raises(DataError, match="one image is not a set"):
        fid(samples=x[:1], reference=x, pixels=True, quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        fid(samples=str(tmp_path / "empty"), reference=x, pixels=True, quiet=True)
    with pytest.raises(RunError, match="No run or weights folder"):
        fid(samples=x, reference=x, encoder=tmp_path / "none", quiet=True)
    folder = tmp_path / "broken"
    folder.mkdir()
    Image.fromarray(x[0]).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no")
    with pytest.raises(DataError, match="only one of 2 images can be read"):
        fid(samples=str(folder), reference=x, pixels=True, workers=0, quiet=True)


def test_workers_map_a_sample_file_themselves(tmp_path: Path) -> None:
    samples = noise(40, 0)
    np.savez_compressed(tmp_path / "s.npz", samples)
    one, two = (
        fid(samples=tmp_path / "s.npz", reference=noise(40, 1), pixels=True, workers=workers, quiet=True)
        for workers in (0, 2)
    )
    assert one.results == two.results


def test_images_are_taken_as_they_are(tmp_path: Path) -> None:
    """At their own size nothing is resampled: a folder and an array of the same images are the same."""
    images = noise(10, 0, size=7)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert np.array_equal(decode((tmp_path / "3.png").read_bytes(), "3"), images[3])
    found = fid(samples=str(tmp_path), reference=images, pixels=True, workers=0, quiet=True)
    assert found.frechet == pytest.approx(0, abs=1e-12)
    assert found.samples.of_another_size == 0
