"""Short texts: the features of the whole context, in every tower that allows them, and nothing cut in the others."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.clip import load_clip
from pipeline.model.text import ShortTokenizer, TooLong, batch_tokenizer, is_causal, why_whole
from pipeline.model.towers import split_attention

MakeDir = Callable[..., Path]
TEXT = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CAPTIONS = ["a dog", "a photo of a small brown dog in the snow", ""]


@pytest.mark.parametrize("architecture", ["flat", "nested", "custom", "layerscale"])
@pytest.mark.parametrize("training", [True, False])
def test_short_texts_have_the_features_of_whole_ones(architecture: str, training: bool, clip_dir: MakeDir) -> None:
    clip = load_clip(f"local-dir:{clip_dir(architecture, text_cfg=TEXT)}")
    model: Any = clip.model.train(training)
    short = batch_tokenizer(model, clip.tokenizer)
    whole, cut = clip.tokenizer(CAPTIONS), short(CAPTIONS)
    assert (whole.shape, cut.shape) == ((3, 40), (3, 16))
    stock: Any = open_clip.create_model(clip.name).train(training)
    for tokens in (whole, cut):
        features = model.encode_text(tokens)
        torch.testing.assert_close(features, stock.encode_text(whole), rtol=0, atol=1e-6)


def test_gradients_of_short_texts_are_those_of_whole_ones(clip_dir: MakeDir) -> None:
    clip = load_clip(f"local-dir:{clip_dir('flat', text_cfg=TEXT)}")
    found = []
    for tokens in (clip.tokenizer(CAPTIONS), batch_tokenizer(clip.model, clip.tokenizer)(CAPTIONS)):
        model = deepcopy(clip.model)
        model.encode_text(tokens).square().sum().backward()  # pyright: ignore[reportCallIssue]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-6 + 1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize(
    ("architecture", "reason"), [("padded", "class token"), ("bidirectional", "not causal")], ids=["coca", "no-mask"]
)
def test_other_towers_get_their_whole_context(architecture: str, reason: str, clip_dir: MakeDir) -> None:
    clip = load_clip(f"local-dir:{clip_dir(architecture)}")
    assert reason in (why_whole(clip.model) or "")
    assert batch_tokenizer(clip.model, clip.tokenizer) is clip.tokenizer


def test_towers_of_open_clip_are_told_apart() -> None:
    """Which of open_clip's own architectures may be cut, by shapes alone."""
    reasons = {}
    for name in ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "coca_ViT-B-32"):
        with torch.device("meta"):
            reasons[name] = why_whole(open_clip.create_model(name, device="meta"))
    assert [name for name, reason in reasons.items() if reason is None] == [
        "ViT-B-16",
        "ViT-B-16-quickgelu",
        "ViT-L-14",
    ]
    assert "last" in (reasons["ViT-B-16-SigLIP"] or "")
    assert "class token" in (reasons["coca_ViT-B-32"] or "")


def test_lengths_round_up_and_keep_every_end() -> None:
    short = ShortTokenizer(open_clip.get_tokenizer("ViT-B-16"), None)
    for words in (1, 5, 6, 7, 30, 200):
        tokens = short([" ".join(["dog"] * words), "a cat"])
        assert tokens.shape == (2, min(77, -(-(words + 2) // 8) * 8))
        assert (tokens == 49407).sum(1).tolist() == [1, 1]


def test_an_end_of_text_id_that_is_not_the_largest_is_kept() -> None:
    rows = {"short": [5, 9, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1], "long": [5, 9, 9, 9, 9, 9, 9, 9, 9, 2, 1, 1]}
    short = ShortTokenizer(lambda texts: torch.tensor([rows[text] for text in texts]), 2)
    assert short(["short"]).tolist() == [rows["short"][:8]]
    assert short(["short", "long"]).shape == (2, 12)


@pytest.mark.parametrize("name", ["ViT-B-16", "flat"])
def test_texts_beyond_the_context_are_found(clip_dir: MakeDir, name: str) -> None:
    """As many as the unlimited encoding says, for texts around the limit and for one that is empty."""
    tokenizer: Any = (
        load_clip(f"local-dir:{clip_dir(name)}").tokenizer if name == "flat" else open_clip.get_tokenizer(name)
    )
    context = tokenizer.context_length
    texts = [" ".join(["dog"] * words) for words in (0, 1, context - 3, context - 2, context - 1, context, 3 * context)]
    wanted = [number for number, text in enumerate(texts) if len(tokenizer.encode(text)) + 2 > context]
    assert len(wanted) == 3
    for batch in (tokenizer, ShortTokenizer(tokenizer, None)):
        assert TooLong.of(tokenizer)(texts, batch(texts)) == wanted
        assert TooLong.of(tokenizer)(texts[:2], batch(texts[:2])) == []


def test_a_padding_that_ends_texts_as_well_hides_none() -> None:
    """SigLIP's tokenizer fills up with the token that ends a text."""

    class Tokens:
        context_length = 4

        def __call__(self, texts: list[str], context_length: int = 4) -> torch.Tensor:
            rows = [[*map(int, text)][: context_length - 1] for text in texts]
            return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])

    texts = ["", "5", "567", "5678", "56789"]
    assert TooLong.of(Tokens())(texts, Tokens()(texts)) == [3, 4]


def test_the_tokenizer_goes_to_other_processes(clip_dir: MakeDir) -> None:
    clip = load_clip(f"local-dir:{clip_dir('flat', text_cfg=TEXT)}")
    short = batch_tokenizer(clip.model, clip.tokenizer)
    assert torch.equal(pickle.loads(pickle.dumps(short))(CAPTIONS), short(CAPTIONS))


class _Masks(TorchDispatchMode):
    """Notes of every attention kernel whether a mask tensor came with it."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name() and "backward" not in func.name():
            rest = [*args[3:], *(kwargs or {}).values()]
            self.masked.append(any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in rest))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("architecture", "masked"), [("flat", False), ("nested", False), ("custom", False)])
def test_causal_attention_carries_no_mask(architecture: str, masked: bool, clip_dir: MakeDir) -> None:
    clip = load_clip(f"local-dir:{clip_dir(architecture, text_cfg=TEXT)}")
    with _Masks() as seen:
        clip.model.encode_text(clip.tokenizer(CAPTIONS))  # pyright: ignore[reportCallIssue]
    assert seen.masked == [masked, masked]


def test_a_mask_that_hides_something_else_is_not_causal() -> None:
    causal = torch.full((8, 8), float("-inf")).triu(1)
    assert is_causal(causal)
    assert not is_causal(torch.zeros(8, 8))
    assert not is_causal(causal.index_fill(1, torch.tensor([0]), float("-inf")))
    assert not is_causal(causal.expand(2, 8, 8))


def test_a_tower_whose_mask_was_changed_is_left_alone() -> None:
    with torch.device("meta"):
        model = split_attention(open_clip.create_model("ViT-B-16", device="meta"))
    model.attn_mask = torch.zeros(77, 77)
    assert "not causal" in (why_whole(model) or "")
