"""Probe heads: the stack is its heads, the rearranged attention is attention, one pass gives every layer mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from close import assert_close
from nextblock import XTRAConfig
from nextblock.errors import ConfigError
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean, layer_means
from nextblock.xtra.heads import AttentiveHeads, LinearHeads, make_heads
from nextblock.xtra.model import Encoder

CONFIG = XTRAConfig(
    image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=3, num_heads=2, predictor_width=16, drop_path=0.5
)


def plain_attentive(head: AttentiveHeads, g: int, tokens: torch.Tensor) -> torch.Tensor:
    """The published form: every token is projected to a key and a value."""
    x = head.norm(tokens.flatten(0, 1)).view_as(tokens)
    keys, values = x @ head.key[g].T, x @ head.value[g].T
    split = "b n (h d) -> b h n d"
    queries = head.query[g].expand(len(x), -1, -1)
    q, k, v = (rearrange(part, split, h=head.num_heads) for part in (queries, keys, values))
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h q d -> b q (h d)").mean(1)
    return out @ head.weight[g].T + head.bias[g]


@pytest.mark.parametrize("num_queries", [1, 3])
def test_the_cheap_attention_is_the_published_one(num_queries: int) -> None:
    head = AttentiveHeads(16, 5, 2, num_heads=4, num_queries=num_queries).double().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(3, 7, 16, dtype=torch.float64)
    found = head(tokens)
    for g in range(2):
        assert_close(found[g], plain_attentive(head, g, tokens), 1e-10)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_heads_of_a_stack_start_alike_and_do_not_touch_each_other(kind: str) -> None:
    heads = make_heads(kind, 16, 4, 3, num_heads=4, generator=torch.Generator().manual_seed(1))
    alone = make_heads(kind, 16, 4, 1, num_heads=4, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(5, 6, 16)
    logits = heads(tokens)
    assert logits.shape == (3, 5, 4)
    assert_close(logits, alone(tokens).expand(3, -1, -1), 1e-5)
    logits[1].sum().backward()
    for parameter in heads.parameters():
        assert not parameter.grad[0].any()
        assert not parameter.grad[2].any()


def test_a_linear_head_takes_pooled_features_too() -> None:
    head = LinearHeads(16, 3).eval()
    tokens = torch.randn(4, 6, 16)
    assert_close(head(tokens), head(tokens.mean(1)), 1e-6)


def test_layer_means_are_the_encoders_own() -> None:
    encoder = Encoder(CONFIG).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = [LayerMean(2, 3), LayerMean(3, 3, True), LayerMean(1, 1), LayerMean.of_last(1, 3)]
    found = layer_means(encoder, images, wanted)
    # the order of tokens is the sequence's own: compare what heads use of them
    assert_close(found[wanted[0]].mean(1), encoder.features(images, 2).mean(1), 1e-12)
    assert_close(found[wanted[1]].mean(1), encoder.features(images, 1, bidirectional=True).mean(1), 1e-12)
    assert_close(found[wanted[3]].sort(1)[0], encoder.features(images).sort(1)[0], 1e-12)
    assert not torch.allclose(found[wanted[2]], found[wanted[3]])


def test_a_classifier_gives_probabilities_and_its_names_are_pinned() -> None:
    model = Classifier(CONFIG, HeadConfig("attentive", LayerMean(2, 3), num_heads=4), ["a", "b", "c"]).eval()
    probabilities = model.probabilities(torch.randn(2, 3, 16, 16))
    assert probabilities.shape == (2, 3)
    assert_close(probabilities.sum(1), torch.ones(2), 1e-5)
    names = {name for name in model.state_dict() if name.startswith("head.")}
    assert names == {
        "head.weight", "head.bias", "head.query", "head.key", "head.value", "head.norm.running_mean",
        "head.norm.running_var", "head.norm.num_batches_tracked",
    }  # fmt: skip
    again = HeadConfig.from_dict(model.head_config.to_dict())
    assert again == model.head_config


def test_what_cannot_work_is_told() -> None:
    with pytest.raises(ConfigError, match="num_heads 16 does not divide the encoder's width 20; these do: 1, 2, 4"):
        AttentiveHeads(20, 3)
    with pytest.raises(ConfigError, match="at least two; got 1"):
        LinearHeads(16, 1)
    with pytest.raises(ConfigError, match="num_queries must be at least 1; got 0"):
        AttentiveHeads(16, 3, num_heads=4, num_queries=0)
    with pytest.raises(ConfigError, match="between 1 and the encoder's depth 3; got 4"):
        LayerMean.of_last(4, 3)
    with pytest.raises(ConfigError, match="the encoder has 3 layers; layers 2-4 asks for more"):
        layer_means(Encoder(CONFIG), torch.randn(1, 3, 16, 16), [LayerMean(2, 4)])
    with pytest.raises(ConfigError, match="the encoder has 3 layers"):
        Classifier(CONFIG, HeadConfig("linear", LayerMean(4, 4)), ["a", "b"])
