"""README.md of an export or a registered version: the hub's metadata, results, origin, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.yaml_file import dump_yaml
from pipeline.handoff.card.facts import CardFacts
from pipeline.handoff.card.figure import write_figure

CARD, FIGURE = "README.md", "results.png"

LIBRARIES = {"open_clip": "open_clip", "hf": "transformers", "peft": "peft", "timm": "timm", "onnx": "onnx"}
LIBRARIES |= {"triton": "onnx", "mlflow": "mlflow"}
# The hub's list of tasks has none for retrieval between images and texts.
RETRIEVAL = "image-text-retrieval"
# Names of the digests and settings of `TrainedModel.facts` in the card.
ORIGIN = {
    "base_model": "base",
    "base_digest": "base weights, sha256",
    "weights_digest": "these weights, sha256",
    "data_digest": "training data, sha256",
    "adapter_digest": "trained parameters, sha256",
    "adapter": "adapter",
    "active_blocks": "active blocks",
    "gate_map": "which",
    "train_rest": "trained outside the blocks",
    "strength": "strength (alpha)",
    "checkpoint": "checkpoint",
    "git_commit": "code",
}
# How each format is loaded; DIR is the folder of this file.
LOADING = {
    "open_clip": """\
```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:DIR")  # or "hf-hub:ORG/NAME"
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
```
""",
    "hf": """\
```python
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

model = CLIPModel.from_pretrained("DIR")  # or "ORG/NAME"
processor = CLIPImageProcessor.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

AutoTokenizer cleans texts as open_clip does (curly quotes, ligatures, HTML entities); CLIPTokenizer does not.
""",
    "peft": """\
```python
from peft import PeftModel
from transformers import CLIPModel

base = CLIPModel.from_pretrained("DIR/base")
model = PeftModel.from_pretrained(base, "DIR")
```

`adapter_config.json` names its base `BASE_NAME`. The folder `base` belongs to the adapter: move the two together.
AutoPeftModel takes a relative name from the working directory, so use the lines above, or start it inside DIR.
""",
    "timm": """\
```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True)  # or "hf-hub:ORG/NAME"; config.json has the label names
```
""",
    "onnx": """\
```python
import numpy, onnxruntime

image = onnxruntime.InferenceSession("DIR/image.onnx")
(vectors,) = image.run(["image_embeds"], {"pixels": pixels})  # (N, 3, H, W), PIXELS
```

`text.onnx` takes `input_ids` (N, context) of `tokenizer.json`, padded with zeros; `head.onnx` takes `image_embeds` and
gives `logits` for the class names in `labels.json`. Images are resized and cropped as `preprocessor_config.json` says.
""",
    "triton": """\
```
tritonserver --model-repository DIR
```

`classify` goes from `pixels` (N, 3, H, W; PIXELS) to `logits`, and its labels are the class names; `image`, `text` and
`head` are also served separately.
""",
    "mlflow": """\
```python
import mlflow, pandas

model = mlflow.pyfunc.load_model("models:/NAME@champion")
model.predict(pandas.DataFrame({"image": [open("photo.jpg", "rb").read()]}))
```

`artifacts/clip` (for a ViT `artifacts/vit`) is a directory for open_clip (timm), which loads it by `local-dir:`.
""",
}


def write_card(directory: Path, facts: CardFacts, *, base_name: str = "base", pixels: str = "uint8") -> list[Path]:
    """Write README.md, and results.png if the weights were evaluated. Returns the files."""
    files = [directory / CARD]
    if facts.results is not None:
        files.append(directory / FIGURE)
        write_figure(files[-1], facts.results, facts.curve, facts.source.strength)
    loading = LOADING[facts.to].replace("BASE_NAME", base_name).replace("PIXELS", _pixels(pixels))
    front = f"---\n{dump_yaml(_metadata(facts))}---\n"
    files[0].write_text("\n".join([front, *_body(facts), "## Loading", "", loading]), encoding="utf-8")
    return files


def summary_line(facts: CardFacts) -> str:
    """The model in a sentence, with its results if there are any."""
    known = facts.source.facts()
    text = f"{known['base_model']}, fine-tuned by selora ({known['adapter']})"
    if facts.results is None:
        return f"{text}; these weights were not evaluated."
    groups = facts.results["groups"]
    parts = [f"{name} {100 * each['mean']:.2f} %" for name, each in groups.items()]
    if (kept := facts.results.get("kept")) is not None:
        parts.append(f"kept {100 * kept['mean']:.2f} % of what the untouched model could do")
    return f"{text}: {', '.join(parts)}."


def _metadata(facts: CardFacts) -> dict[str, Any]:
    task = "image-classification" if facts.is_vit else "zero-shot-image-classification"
    metadata: dict[str, Any] = {
        "library_name": LIBRARIES[facts.to],
        "pipeline_tag": task,
        "tags": ["selora", "timm" if facts.is_vit else "clip", "lora"],
    }
    if facts.base_licence is not None:
        metadata["license"] = facts.base_licence
    if facts.base_entry is not None:
        metadata["base_model"] = facts.base_entry
    if facts.results is not None:
        found = [
            {
                "task": {"type": RETRIEVAL if row["group"] == "retrieval" else task},
                "dataset": {"name": key, "type": key},
                "metrics": [{"type": row["metric"], "value": round(row["value"], 6)}],
            }
            for key, row in facts.results["datasets"].items()
        ]
        metadata["model-index"] = [{"name": facts.title, "results": found}]
    return metadata


def _body(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.title}"
    yield ""
    yield summary_line(facts)
    yield ""
    if facts.results is not None:
        yield from _results(facts.results)
    if facts.loss:
        yield from _loss(facts.loss)
    yield from _origin(facts)
    if facts.checked:
        yield "## Checked"
        yield ""
        yield from (f"- {line}" for line in facts.checked)
        yield ""


def _results(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Learned and kept"
    yield ""
    yield f"![results]({FIGURE})"
    yield ""
    yield from ("| group | dataset | metric | untouched | this model | change | n |", "|---|---|---|--:|--:|--:|--:|")
    for key, row in results["datasets"].items():
        before, change = row.get("baseline"), row["change"]
        cells = [row["group"], key, row["metric"], _percent(before), _percent(row["value"])]
        cells += ["" if change is None else f"{100 * change:+.2f}", str(row["n"])]
        yield f"| {' | '.join(cells)} |"
    yield ""
    kept, strength = results.get("kept"), results.get("strength") or {}
    if kept is not None:
        yield (
            f"Kept {100 * kept['mean']:.2f} % (mean of min(1, after / before) over the datasets other than id); "
            f"least of {kept['worst']}, {100 * kept['worst_share']:.2f} %."
        )
    if "floor" in strength:
        yield f"Strength alpha {strength['alpha']:g}, chosen on other images, keeps the floor {strength['floor']}."
    digests = sorted({str(row.get("dataset_digest"))[:12] for row in results["datasets"].values()})
    yield f"Benchmark {results['benchmark']}, {results['precision']}; data digests {', '.join(digests)}."
    yield ""


def _loss(loss: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Loss of the 8-bit weights"
    yield ""
    yield from ("| dataset | metric | fp32 | int8 | change | n |", "|---|---|--:|--:|--:|--:|")
    for row in loss:
        change = f"{100 * (row['after'] - row['before']):+.2f}"
        cells = [row["dataset"], row["metric"], _percent(row["before"]), _percent(row["after"]), change, str(row["n"])]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _origin(facts: CardFacts) -> Iterator[str]:
    yield "## Origin"
    yield ""
    known = facts.source.facts()
    yield from (f"- {name}: {known[key]}" for key, name in ORIGIN.items() if key in known)
    if facts.base_entry is not None:
        yield f"- base on the hub: https://huggingface.co/{facts.base_entry}"
    licence = facts.base_licence
    yield f"- licence of the base: {licence or 'not known: ask its publisher'}"
    yield "- licence of the training data: not known to selora; it also applies to this model"
    yield ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _pixels(pixels: str) -> str:
    return "uint8 from 0 to 255" if pixels == "uint8" else "float32, normalized by the mean and std there"
