"""CLIP's tokenizer as files of the tokenizers library, with as much of open_clip's text cleaning as they can express.

open_clip repairs a text before it reads it: ftfy's fix_text, then HTML entities. transformers' own CLIPTokenizer does
neither. The normalizer of tokenizer.json is a list of replacements, which covers most of it: curly quotes, ligatures,
full-width characters, control characters, the entities of HTML 4, and numeric entities of Latin-1. Not covered: text
that was decoded with a wrong encoding ("cafÃ©"), other entities, quotes as entities in a text with "<", C1 control
characters, terminal escapes, a final capital sigma, and special tokens that are written out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from html import unescape
from html.entities import html5, name2codepoint
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# As in ftfy: characters that are split, narrowed, straightened and dropped.
_LIGATURES = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬅﬆ"
_QUOTES = {"[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"'}
_CONTROLS = r"[\x00-\x08\x0B\x0E-\x1F\x7F\x{206A}-\x{206F}\x{FEFF}\x{FFF9}-\x{FFFC}]"
# Characters that are read as numeric entities as well: ASCII, Latin-1, dashes, quotes, the ellipsis.
_NUMBERS = (*range(33, 127), *range(0xA0, 0x100), 0x2013, 0x2014, 0x2018, 0x2019, 0x201C, 0x201D, 0x2026)


def tokenizer_files(context_length: int) -> dict[str, Any]:
    """File name -> content (a dict is JSON) of CLIP's tokenizer, from the vocabulary that open_clip ships.

    tokenizer.json is for AutoTokenizer and for the tokenizers library; vocab.json and merges.txt are for CLIPTokenizer
    and other readers, without the cleaning.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): number for token, number in tokenizer.encoder.items()}
    if (vocabulary[START], vocabulary[END]) != (START_ID, END_ID):
        raise RuntimeError("open_clip's vocabulary is not CLIP's")
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    return {
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer.json": json.dumps(_fast(vocabulary, merges, context_length), ensure_ascii=False) + "\n",
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            # AutoTokenizer uses tokenizer.json unchanged; CLIPTokenizer would replace its normalizer
            "tokenizer_class": "PreTrainedTokenizerFast",
            "do_lower_case": True,
            "model_max_length": context_length,
            "errors": "replace",
            **special,
        },
    }


def _fast(vocabulary: dict[str, int], merges: list[str], context_length: int) -> dict[str, Any]:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": context_length,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **special} for token in (START, END)],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers())},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, END_ID],
            "cls": [START, START_ID],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _normalizers() -> Iterator[dict[str, Any]]:
    """The cleaning in the order of ftfy's fix_text, with the entities first, which open_clip unescapes three times."""
    yield _replace("&(?:amp;|AMP;|#0*38;|#[xX]26;)+", "&")
    for pattern, character in _entities():
        yield _replace(pattern, character)
    for ligature in _LIGATURES:
        parts = unicodedata.decomposition(ligature).split()[1:]
        yield _replace(ligature, "".join(chr(int(part, 16)) for part in parts))
    for wide in (*range(0xFF01, 0xFFEF), 0x3000):
        narrow = unicodedata.normalize("NFKC", chr(wide))
        if narrow != chr(wide):
            yield _replace(chr(wide), narrow)
    for pattern, quote in _QUOTES.items():
        yield _replace(pattern, quote)
    yield _replace(_CONTROLS, "")
    yield {"type": "NFC"}
    yield _replace(r"\s+", " ")
    yield {"type": "Lowercase"}


def _entities() -> Iterator[tuple[str, str]]:
    """A pattern for all spellings of a character as an entity, and the character."""
    spellings: dict[str, list[str]] = {}
    for name in (*name2codepoint, "LT", "GT", "QUOT", "COPY", "REG", "apos"):
        if name != "amp":
            end = ";?" if name in html5 else ";"  # HTML accepts the oldest ones without it
            spellings.setdefault(unescape(f"&{name};"), []).append(name + end)
    for number in _NUMBERS:
        spelling = f"#(?:0*{number}|[xX]0*(?i:{number:x}))(?![0-9a-fA-F]);?"
        spellings.setdefault(chr(number), []).append(spelling)
    for character, names in spellings.items():
        yield f"&(?:{'|'.join(names)})", character


def _replace(pattern: str, content: str) -> dict[str, Any]:
    kind = "String" if re.escape(pattern) == pattern else "Regex"
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}
