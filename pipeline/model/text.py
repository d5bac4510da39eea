"""Captions to tokens, cut to the longest caption of a batch if shorter texts give the same features.

A text tower with a causal mask that takes its feature at the end-of-text token never reads the tokens after it: the
padding to CLIP's 77 tokens is computed in vain. Without a causal mask (SigLIP) every token reads the padding, and the
position of a feature taken at the end or from a class token (CoCa) depends on the length, so those towers get their
whole context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.attention import SplitAttention

Tokenizer = Callable[[list[str]], Tensor]

# Lengths are multiples of this: tensor cores need it, and a compiled tower is compiled for few lengths.
MULTIPLE = 8


@dataclass(frozen=True)
class ShortTokenizer:
    """A tokenizer whose tokens are cut to the longest text of the call, rounded up to a multiple of 8.

    tokenizer: N texts -> (N, context) int64. end_id: the end-of-text id, if the tower looks for it; None if it
    takes the largest id of a row.
    """

    tokenizer: Tokenizer
    end_id: int | None

    def __call__(self, texts: list[str]) -> Tensor:
        """N texts -> (N, length) int64, length at most the context."""
        return self.cut(self.tokenizer(texts))

    def cut(self, tokens: Tensor) -> Tensor:
        """(N, context) -> (N, length)."""
        ends = tokens if self.end_id is None else (tokens == self.end_id).int()
        longest = int(ends.argmax(dim=-1).max()) + 1
        return tokens[:, : -(-longest // MULTIPLE) * MULTIPLE].contiguous()


@dataclass(frozen=True)
class TooLong:
    """Finds the texts with more tokens than the context of a tower, whose end is therefore not read.

    Attributes:
        tokenizer: open_clip's, which takes ``context_length``.
        padding: the token behind the end of a short text.
    """

    tokenizer: Any
    padding: int

    @staticmethod
    def of(tokenizer: Any) -> TooLong:
        """For a tokenizer of open_clip."""
        return TooLong(tokenizer, int(tokenizer([""])[0, -1]))

    def __call__(self, texts: list[str], tokens: Tensor) -> list[int]:
        """The indices of such texts among N with tokens (N, L), L up to the context.

        Only texts that fill the context, or all but its last token, are tokenized again, with one more token.
        """
        context = self.tokenizer.context_length
        if tokens.shape[1] < context:
            return []
        full = (tokens[:, -2] != self.padding).nonzero().flatten().tolist()
        if not full:
            return []
        longer = self.tokenizer([texts[number] for number in full], context_length=context + 1)
        differs = (longer[:, :context] != tokens[full]).any(dim=1).tolist()
        return [number for number, cut in zip(full, differs, strict=True) if cut]


def batch_tokenizer(model: nn.Module, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer to use for a batch: for short texts if the tower allows them, otherwise `tokenizer` itself.

    It is picklable and needs no device, so the loader's workers can use it.
    """
    if why_whole(model) is not None:
        return tokenizer
    tower = _tower(model)
    pooled = tower.pool_type if tower is not model else tower.text_pool_type
    end_id = tower.eos_id if tower is not model else tower.text_eos_id
    return ShortTokenizer(tokenizer, end_id if pooled == "eos" else None)


def why_whole(model: nn.Module) -> str | None:
    """Why this model must get its whole context; None if texts may be cut after their end-of-text token."""
    tower = _tower(model)
    pooled = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", None)
    if getattr(tower, "cls_emb", None) is not None:
        return "its text feature is a class token behind the padding"
    if pooled not in ("argmax", "eos"):
        return f"its text feature is taken at the position {pooled!r}, which moves with the length"
    mask = getattr(tower, "attn_mask", None)
    if mask is None or not is_causal(mask):
        return "its text attention is not causal, so every token reads the padding"
    return None


def is_causal(mask: Tensor) -> bool:
    """Whether an additive mask (L, L) hides exactly the later positions."""
    if mask.is_meta:  # no values, only shapes; open_clip builds no other square mask
        return mask.ndim == 2
    causal = torch.full(mask.shape[-2:], float("-inf")).triu_(1)
    return mask.ndim == 2 and torch.equal(mask.cpu().to(causal.dtype), causal)


def accept_short_texts(model: Any) -> Any:
    """Let a CLIP of open_clip take texts shorter than its context, and mark its causal attention; in place.

    open_clip's `CLIP.encode_text` adds all positions and passes on the whole mask. Its TextTransformer (of
    CustomTextCLIP) already takes short texts, and only its mask must be removed.
    """
    tower = _tower(model)
    mask = getattr(tower, "attn_mask", None)
    if mask is not None and getattr(tower, "cls_emb", None) is None and is_causal(mask):
        for module in tower.transformer.modules():
            if isinstance(module, SplitAttention):
                module.causal = True
    if tower is model and why_whole(model) is None:
        model.encode_text = MethodType(_encode_text, model)
    return model


def _tower(model: Any) -> Any:
    """The module that holds the text tower's own parameters: `model.text`, or the CLIP itself."""
    return model.text if hasattr(model, "text") else model


def _encode_text(self: Any, text: Tensor, normalize: bool = False) -> Tensor:
    """`open_clip.CLIP.encode_text` for tokens (B, L) with L up to the context -> features (B, D)."""
    from open_clip.transformer import text_global_pool

    dtype = self.transformer.get_cast_dtype()
    x = self.token_embedding(text).to(dtype)
    x = x + self.positional_embedding[: text.shape[1]].to(dtype)
    x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
    x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)
    if isinstance(self.text_projection, nn.Linear):
        x = self.text_projection(x)
    elif self.text_projection is not None:
        x = x @ self.text_projection
    return F.normalize(x, dim=-1) if normalize else x
