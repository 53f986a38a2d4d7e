from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import projection, projection_page
from benchmarks.curves import About, curve
from benchmarks.projection import Assumptions, Run, Step

# A GPU of 1,000 operations a second, half of them used; nodes of 2; 10 bytes/s inside, 4 through the network card.
ASSUMED = Assumptions(
    peak=1000, shares=(0.5,), inside=10, network=4, gpus_a_node=2, node_memory=8000, overlap=0.75, files_a_second=2,
    wait_s=100,
)  # fmt: skip
RUN = Run("tiny", flops=50, parameters=5, images=86_400, epochs=10, batch=40, bytes_per_image=7)


def test_a_ring_sends_twice_all_but_one_share() -> None:
    assert projection.ring(12, 4, 3) == 2 * 3 / 4 * 12 / 3
    assert projection.ring(12, 1, 3) == 0


def test_the_exchange_has_two_levels() -> None:
    assert projection.exchange(20, 1, ASSUMED) == 0
    assert projection.exchange(20, 2, ASSUMED) == 2 * 1 / 2 * 20 / 10  # inside the node
    assert projection.exchange(20, 8, ASSUMED) == 2.0 + 2 * 3 / 4 * (20 / 2) / 4  # four nodes, half of it each GPU


def test_a_step_waits_for_what_the_backward_pass_does_not_hide() -> None:
    """40 images of 50 operations at 500 a second: 4 s; half of them (two thirds, three quarters of it) hide 2 s."""
    one = projection.step(RUN, 1, 0.5, ASSUMED)
    assert one == Step(4.0, 0.0, 0.0)
    two = projection.step(RUN, 2, 0.5, ASSUMED)  # 2 s of products hide 1 s; 20 bytes of gradients take 2 s
    assert two.compute_s == 2.0
    assert two.exchange_s == 2.0
    assert two.waited_s == pytest.approx(1.0)
    assert two.seconds == pytest.approx(3.0)


def test_days_are_steps_times_their_seconds() -> None:
    """864,000 images in batches of 40: 21,600 steps of 4 s, one day."""
    assert projection.days(RUN, 1, 0.5, ASSUMED) == pytest.approx(1.0)
    assert projection.days(RUN, 2, 0.5, ASSUMED) == pytest.approx(0.75)
    assert projection.images_a_second(RUN, 1, 0.5, ASSUMED) == pytest.approx(10.0)
    assert projection.images_a_second(RUN, 2, 0.5, ASSUMED) == pytest.approx(40 / 2 / 3)


def test_thresholds_are_where_waiting_begins() -> None:
    fast = replace(ASSUMED, inside=1e9, network=1e9)
    assert projection.gpus_until_waiting(RUN, 0.5, fast) is None
    assert projection.gpus_until_waiting(RUN, 0.5, ASSUMED) == 4
    # 4 GPUs: 1 s of products hides 0.5 s; over two nodes half of the gradients, 10 bytes, take 10 / bandwidth.
    assert projection.network_until_waiting(RUN, 4, 0.5, replace(ASSUMED, inside=1e12)) == pytest.approx(20, rel=1e-6)
    bandwidth = projection.network_until_waiting(RUN, 4, 0.5, fast)
    assert projection.step(RUN, 4, 0.5, replace(fast, network=bandwidth)).waited_s == pytest.approx(0, abs=1e-9)
    assert projection.step(RUN, 4, 0.5, replace(fast, network=bandwidth / 2)).waited_s > 0.4
    assert projection.network_until_waiting(RUN, 4, 0.5, ASSUMED) == float("inf")  # inside the node it waits already


def test_a_checkpoint_holds_weights_moments_and_the_average() -> None:
    assert RUN.gradient_bytes == 20
    assert RUN.state_bytes == 60
    assert replace(RUN, averaged=True).state_bytes == 80


def results(folder: Path) -> Path:
    """Numbers that are easy to compute with: 2 µs a file, 1 byte of index, and so on."""

    def straight(name: str, each: float, **more: Any) -> dict[str, Any]:
        xs = (1e3, 1e6)
        return curve(About(name, name, "n", "s", "n"), {x: [each * x] for x in xs}, {x: x for x in xs}) | more

    mib = 2**20
    curves = [
        straight("pipeline", 1.0, bytes_per_image=100_000), straight("open files", 2e-6),
        straight("index of files", 50 / mib), straight("index of Parquet rows", 10 / mib),
        straight("fingerprint of files", 1e-5), straight("fingerprint of files, peak", 100 / mib),
        straight("checkpoint", 1e-9), straight("shuffle", 1e-3),
    ]  # fmt: skip
    write(folder, "scaling-cpu", {"groups": {"all": {"curves": curves}}})
    write(folder, "speed-cpu", tables("image pipeline, 256 px random crops, one core", 400.0))
    write(folder, "probe_cost-cpu", {"ratio_to_one_head": {"grid of 18 heads": 1.5}})
    return folder


def write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(values))


def tables(name: str, ours: float) -> dict[str, Any]:
    return {"tables": {"all": {"rows": [{"name": name, "ours": ours}]}}}


def test_the_two_trainings_are_those_of_the_papers(tmp_path: Path) -> None:
    xtra, xar = projection.runs(projection.measured_in(results(tmp_path)), tmp_path, Assumptions())
    assert (xtra.images, xtra.epochs, xtra.batch) == (13_100_000, 100, 2088)
    assert (xar.images, xar.epochs, xar.batch) == (1_281_167, 800, 2048)
    assert (round(xtra.parameters / 1e6), round(xar.parameters / 1e6, 1)) == (865, 1186.0)
    # Six operations for each weight that a token passes, of 240 and 256 tokens, and attention besides.
    assert 1.0 < xtra.flops / (6 * 240 * (631e6 + 50e6)) < 1.1
    assert 1.0 < xar.flops / (6 * 256 * 40 * 12 * 1280**2) < 1.1
    assert xar.bytes_per_image == pytest.approx(2 * 2 * 16 * 16 * 16 / 2 * 2, rel=1e-3)  # 16 kB of float16
    assert xtra.measured_share is None


def test_what_a_gpu_measured_is_taken(tmp_path: Path) -> None:
    results(tmp_path)
    write(tmp_path, "speed-cuda", tables("XTRA-H/14 training step, bf16", 400.0))
    products = curve(
        About("matrix product", "p", "n", "s", "n", rate=True), {1.0: [5e14], 2.0: [8e14]}, {1.0: 1, 2.0: 1}
    )
    write(tmp_path, "scaling-cuda", {"groups": {"products": {"curves": [products]}}})
    assumed = projection.assumed_in(tmp_path)
    assert assumed.peak == 8e14
    xtra = projection.runs(projection.measured_in(tmp_path), tmp_path, assumed)[0]
    assert xtra.measured_share == pytest.approx(400 * xtra.flops / 8e14)
    assert " at 51 % |" in projection_page.time_table([xtra], assumed)
    assert "| 800 TFLOP/s | measured |" in projection_page.assumptions_table(assumed)


def test_what_gives_way_first_stands_first(tmp_path: Path) -> None:
    measured = projection.measured_in(results(tmp_path))
    found = projection_page.limits([RUN], measured, ASSUMED)
    assert [images for images, _, _ in found] == sorted(images for images, _, _ in found)
    by = {what: images for images, what, _ in found}
    assert by["memory, indices of files"] == pytest.approx(0.1 * 8000 / (2 * 50))
    assert by["memory of the fingerprint"] == pytest.approx(0.1 * 8000 / 100)
    assert by["starting on single files in shared storage"] == 200
    assert by["starting on single files, their sizes cached"] == pytest.approx(1e7)
    assert by["single files on ext4"] == 2**32


def test_the_page_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    names = list(projection_page.tables(results(tmp_path)))
    page = tmp_path / "scaling.md"
    page.write_text(
        "# Scaling\n" + "".join(f"<!-- {n}: begin -->\nstale words\n<!-- {n}: end -->\nprose\n" for n in names)
    )
    for _ in range(2):  # again changes nothing
        assert projection_page.main(["--results", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert "stale words" not in text
    assert text.count("prose\n") == len(names)
    assert "| an epoch of XTRA-H on 64 GPUs at 40 % |" in text
    assert "| the images themselves | 1.3 TB | 10.0 TB | 100.0 TB |" in text
    assert "| xAR-H, ImageNet latents | 19.0 GB | 19 s | 23.7 GB |" in text
    with pytest.raises(ValueError, match="no lines <!-- curves: begin -->"):
        projection_page.rewrite("nothing", {"curves": ""})


def test_what_is_lacking_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"'checkpoint' is not measured yet; run python -m benchmarks\.scaling"):
        projection.measured_in(tmp_path)


def test_the_page_of_the_repository_has_all_markers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    results_folder = Path(__file__).parents[2] / "benchmarks" / "results"
    tables = projection_page.tables(results_folder)
    assert all(f"<!-- {name}: begin -->" in text for name in tables)
    assert projection_page.rewrite(text, tables) == text, "out of date: run python -m benchmarks.projection"
