"""The exported tokenizer next to open_clip's, on texts that open_clip repairs before it reads them."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
from tokenizers import Tokenizer

from pipeline.model.hf_tokenizer import END_ID, tokenizer_files

ODD = [
    "a photo of a cat.", "‘curly’ “quotes” it’s", "the ﬁrst oﬃce ﬂoor", "fish &amp; chips", "&quot;hi&quot; &lt;b&gt;",
    "rock &amp;amp; roll", "caf&eacute; cr&egrave;me", "caf&#233; &#xE9;", "it&#39;s &#x27;x&#x27;",
    "ＦＵＬＬ ｗｉｄｔｈ！",
    "x\u200by zero", "a\u00a0b nbsp", "tab\tnew\nline  two", "İstanbul", "straße STRASSE", "½ cup", "emoji 😀👨‍👩‍👧",
    "日本語テキスト", "ｶﾀｶﾅ", "e\u0301 combining", "\ufeffbom", "100% OFF!!!", "don't can't we'll", "snake_case_word",
    "ŉ ĳ Ǆ", "…ellipsis…", "— dash – dash", "™ © ® &copy; &copy 2020 &trade;", "&nbsp;hello", "&AMP; &LT;up",
    "&hellip;&ndash;", "", "   ", "a shirt " * 60,
]  # fmt: skip
# What the page on exports lists as read in another way.
REMAINING = ["cafÃ©", "ΣΙΣΥΦΟΣ", "<|endoftext|> in text", "\x1b[31mred\x1b[0m", "a\x85b", "5<6 &rsquo;", "&#x4e2d;"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    content = tokenizer_files(77)["tokenizer.json"]
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer.from_file(str(file))


def by_open_clip(text: str) -> list[int]:
    tokens = open_clip.get_tokenizer("ViT-B-32")([text])[0].tolist()
    return tokens[: tokens.index(END_ID) + 1]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_are_read_as_open_clip_reads_them(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(text).ids == by_open_clip(text)


def test_what_the_page_says_remains_does_remain(tokenizer: Tokenizer) -> None:
    """A text that is read alike by now belongs into the list above."""
    assert [text for text in REMAINING if tokenizer.encode(text).ids == by_open_clip(text)] == []


def test_autotokenizer_takes_the_file_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(77).items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    found = tokenizer(["it’s “new” &amp; blue", "a cat"], padding="max_length", truncation=True)["input_ids"]
    for row, text in zip(found, ["it’s “new” &amp; blue", "a cat"], strict=True):
        assert row[: row.index(END_ID) + 1] == by_open_clip(text)
        assert len(row) == 77
