"""What the help says above each group of options is the first line of a section's docstring, so a whole sentence."""

from __future__ import annotations

from importlib import import_module

import pytest

from nextblock.cli import VERBS, main

WITH_SECTIONS = [verb for verb, (module, _) in VERBS.items() if hasattr(import_module(module), "SECTIONS")]


@pytest.mark.parametrize("verb", WITH_SECTIONS)
def test_a_title_is_a_whole_sentence(verb: str) -> None:
    for section in import_module(VERBS[verb][0]).SECTIONS.values():
        assert (section.__doc__ or "").partition("\n")[0].endswith("."), section


def test_cached_latents_are_named_where_a_generator_is_told_what_to_learn_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train-generator", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--data.train TRAIN a folder of latents made by `nextblock cache-latents`; or images: a folder" in told
    assert "What is learned from: images (the model then works on pixels) or cached latents: --data.train" in told
