"""K-NN: equal to scikit-learn, exact for any division of the bank, and a row of the table like any other."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from pipeline.config import ConfigError
from pipeline.data.eval.batches import eval_loader
from pipeline.data.eval.wds_layout import EvalSet, open_eval_set
from pipeline.data.images import normalize
from pipeline.data.storage.cache import Cache
from pipeline.doctor.benchmark import compare_with_published
from pipeline.evaluation.command import EvalRequest, evaluate_command
from pipeline.evaluation.datasets.benchmark import load_benchmark
from pipeline.evaluation.datasets.dataset import Settings, open_dataset
from pipeline.evaluation.measures.knn import Nearest, as_logits, class_votes, count_votes, from_keys, merged, to_keys
from pipeline.evaluation.run import evaluate
from pipeline.evaluation.strength import evaluate_strength
from pipeline.evaluation.summary import format_summary
from pipeline.method.adapter import blocks
from pipeline.model.clip import Clip, load_clip
from pipeline.runs.results import read_summary

SETTINGS = Settings(batch_size=16, workers=0)
CPU = torch.device("cpu")
T = 0.07


@pytest.fixture
def clip(trained_clip_dir: Path) -> Clip:
    return load_clip(f"local-dir:{trained_clip_dir}")


def bench(folder: Path, *rows: str) -> Path:
    file = folder / "bench.yaml"
    file.write_text("datasets:\n" + "".join(f"  - {{{row}}}\n" for row in rows))
    return file


def unit(*shape: int, seed: int) -> Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def neighbours(queries: Tensor, bank: Tensor, k: int, pieces: int = 1, parts: int = 1) -> Tensor:
    """The keys, from a bank that comes in pieces, last first, to several ranks."""
    shares = []
    for numbers in torch.arange(len(bank)).tensor_split(parts):
        nearest = Nearest.of(queries, k, CPU)
        for piece in reversed(numbers.tensor_split(pieces)):
            nearest.add(bank[piece], piece)
        shares.append(nearest.keys)
    return merged(shares)


def sklearn_says(bank: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (Q,) and shares of the votes (Q, classes that the bank has)."""
    classifier: Any = KNeighborsClassifier  # its annotations allow no function of the distance
    model = classifier(k, weights=lambda distance: np.exp((1 - distance) / T), metric="cosine", algorithm="brute")
    model.fit(bank.double().numpy(), labels.numpy())
    return model.predict(queries.double().numpy()), model.predict_proba(queries.double().numpy())


@pytest.mark.parametrize("k", [1, 20, 211])
def test_votes_and_metrics_are_scikit_learns(k: int) -> None:
    bank, queries = unit(211, 16, seed=1), unit(150, 16, seed=2)
    draw = torch.Generator().manual_seed(3)
    labels, truth = (torch.randint(7, (n,), generator=draw) for n in (211, 150))
    keys = neighbours(queries, bank, k)
    predicted, shares = sklearn_says(bank, labels, queries, k)
    similarities, numbers = from_keys(keys)
    votes = class_votes(similarities, labels[numbers], 7, T)
    assert np.allclose(votes / votes.sum(dim=1, keepdim=True), shares, atol=1e-6)
    assert as_logits(votes).argmax(dim=1).tolist() == predicted.tolist()
    counts = count_votes(keys, labels, truth, 7, T)
    metrics = counts.metrics()
    assert counts.confusion.tolist() == confusion_matrix(truth, predicted, labels=range(7)).tolist()
    assert metrics["acc1"] == (predicted == truth.numpy()).mean()
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    if k > 1:  # with one neighbour scikit-learn fills the five up with classes that got no vote
        assert metrics["acc5"] == pytest.approx(top_k_accuracy_score(truth, shares, k=5, labels=range(7)))


def test_chunks_of_a_bank_change_nothing() -> None:
    """Six in seven images of the bank stand in it several times, so most queries have ties at their k-th neighbour."""
    some = unit(30, 8, seed=4)
    bank = some[torch.randint(30, (200,), generator=torch.Generator().manual_seed(5))]
    queries = torch.cat([unit(40, 8, seed=6), some[:10]])
    keys = neighbours(queries, bank, 17)
    similarities = (queries.double() @ bank.double().T).float().numpy()
    expected = [np.lexsort((np.arange(200), -row))[:17].tolist() for row in similarities]
    assert from_keys(keys)[1].tolist() == expected
    for pieces, parts in ((7, 1), (200, 1), (3, 2), (60, 3), (1, 200)):
        assert torch.equal(neighbours(queries, bank, 17, pieces, parts), keys)


def test_keys_keep_every_order() -> None:
    values = torch.tensor([[1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45, 0.5, -0.5]])
    back, numbers = from_keys(to_keys(values.double(), torch.arange(8)).sort(dim=1, descending=True).values)
    assert numbers.tolist() == [[0, 6, 4, 2, 3, 5, 7, 1]]
    assert back.tolist() == [sorted(values[0].tolist(), reverse=True)]
    assert from_keys(to_keys(values.double(), torch.full((8,), 2**32 - 1)))[1].tolist() == [[2**32 - 1] * 8]


def test_equal_votes_go_to_the_lower_label() -> None:
    """Equal votes go to the lower label, and without votes there is no answer."""
    similarities = torch.tensor([[0.9, 0.9, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
    labels = torch.tensor([[6, 2, 2, 6], [5, 5, 1, 0]])
    logits = as_logits(class_votes(similarities, labels, 8, T))
    assert logits.argmax(dim=1).tolist() == [2, 5]
    assert logits[0].isfinite().nonzero().flatten().tolist() == [2, 6]
    assert logits[1].topk(3).indices.tolist() == [5, 0, 1]
    numbers = torch.arange(8).view(2, 4)
    keys = torch.stack([to_keys(similarities[i : i + 1], numbers[i])[0] for i in range(2)])
    # Label 0 of the first query would be among the best five if classes without a vote were.
    counts = count_votes(keys, labels.flatten(), torch.tensor([0, 1]), 8, T)
    assert (counts.top1, counts.top5) == (0, 1)


def test_no_temperature_overflows() -> None:
    votes = class_votes(torch.tensor([[1.0, 0.99, -1.0]]), torch.tensor([[1, 0, 2]]), 3, 1e-4)
    assert votes.isfinite().all() and votes.argmax() == 1


def features_of(clip: Clip, data: EvalSet, **options: Any) -> tuple[Tensor, Tensor]:
    model, config = clip.model, clip.preprocess_cfg
    parts = []
    with torch.no_grad():
        for batch in eval_loader(data, config, batch_size=9, workers=0, **options):
            pixels = normalize(batch.images, config["mean"], config["std"])
            encoded = model.encode_image(pixels)  # pyright: ignore[reportCallIssue]
            parts.append((torch.nn.functional.normalize(encoded, dim=-1), batch.labels))
    return torch.cat([each for each, _ in parts]), torch.cat([labels for _, labels in parts])


@pytest.mark.parametrize("resize", [None, "squash", 40])
def test_a_row_gives_what_scikit_learn_gives(tmp_path: Path, clip: Clip, known_set: Path, resize: Any) -> None:
    row = f"key: known, group: source, path: {known_set}, neighbours: 9" + (f", resize: {resize}" if resize else "")
    table = load_benchmark(bench(tmp_path, row))
    result = evaluate(clip, table, tmp_path / "out", SETTINGS).results["known"]
    bank, bank_labels = features_of(clip, open_eval_set(known_set, split="train"), resize=resize)
    queries, labels = features_of(clip, open_eval_set(known_set), resize=resize)
    predicted, _ = sklearn_says(bank, bank_labels, queries, 9)
    assert result["task"] == "knn_classification"
    assert result["value"] == result["metrics"]["acc1"] == (predicted == labels.numpy()).mean()
    cells = {(true, said): count for true, said, count in result["confusion"]}
    assert cells == {
        (t, p): n for (t, p), n in np.ndenumerate(confusion_matrix(labels, predicted, labels=range(12))) if n
    }
    assert (result["n"], result["bank"], result["neighbours"], result["temperature"]) == (45, 70, 9, T)
    assert (result["classes"], result["chance"]) == (12, 1 / 12)
    assert 0.1 < result["value"] < 1


def test_a_resize_is_torchvisions(clip: Clip, known_set: Path) -> None:
    """DINO's Resize(256) and CenterCrop(224), and the plain resize of its target sets, in small."""
    data, how = open_eval_set(known_set), InterpolationMode.BICUBIC
    decoded = []
    for i in range(len(data)):
        tar, number = data.places[i]
        index = data.tars[tar]
        ext = next(ext for ext in index.samples[number].members if ext != "cls")
        decoded.append(Image.open(io.BytesIO(index.read(number, ext))).convert("RGB"))
    cases: dict[int | Literal["squash"], list[Any]]
    cases = {37: [Resize(37, how), CenterCrop(32)], "squash": [Resize((32, 32), how)]}
    for resize, steps in cases.items():
        expected = torch.stack([Compose([*steps, PILToTensor()])(image) for image in decoded])
        loader = eval_loader(data, clip.preprocess_cfg, batch_size=64, workers=0, resize=resize)
        assert torch.equal(torch.cat([batch.images for batch in loader]), expected)


def test_more_neighbours_than_the_bank_has_are_all_of_it(tmp_path: Path, clip: Clip, known_set: Path) -> None:
    rows = [f"key: {key}, group: source, path: {known_set}, neighbours: {k}" for key, k in (("a", 70), ("b", 999))]
    found = evaluate(clip, load_benchmark(bench(tmp_path, *rows)), tmp_path / "out", SETTINGS).results
    assert found["a"]["confusion"] == found["b"]["confusion"]
    assert found["b"]["neighbours"] == 70


@pytest.mark.parametrize(
    "change", ["neighbours: 3", "temperature: 0.5", "resize: squash", "resize: 33", "bank: extra", "border: 1"]
)
def test_all_that_decides_a_result_makes_it_another(
    tmp_path: Path, clip: Clip, make_classification: Callable[..., Path], change: str
) -> None:
    for split, seed in (("test", 1), ("train", 2), ("extra", 3)):
        make_classification(tmp_path / "wds_a", n=12, shards=1, seed=seed, split=split)
    settings = replace(SETTINGS, cache=Cache(tmp_path / "cache", 10**9))

    def run(more: str) -> tuple[list[str], Any]:
        row = f"key: a, group: source, path: wds_a{more}"
        outcome = evaluate(clip, load_benchmark(bench(tmp_path, row)), tmp_path / "out", settings)
        return outcome.skipped, {**outcome.results["a"], "seconds": None}

    first = run("")[1]
    assert run("") == (["a"], first)
    skipped, second = run(f", {change}")
    assert skipped == [] and second["dataset_digest"] != first["dataset_digest"]
    kept = len(list((tmp_path / "cache" / "files").glob("*/*.pixels")))
    assert kept == {"neighbours: 3": 2, "temperature: 0.5": 2, "bank: extra": 3}.get(change, 4)
    settings = SETTINGS  # without the cache it is the same
    (tmp_path / "out" / "a.json").unlink()
    assert run(f", {change}") == ([], second)


def test_other_rows_keep_their_digests(tmp_path: Path, datasets: Path) -> None:
    """Of before there was K-NN: results that lie on disks still hold."""
    dataset = open_dataset(load_benchmark(bench(tmp_path, f"key: a, group: id, path: {datasets / 'wds_id'}")).rows[0])
    parts = [dataset.data.digest, dataset.classnames, dataset.templates, None, 0, "acc1", None]
    assert dataset.digest == hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def test_a_limit_thins_queries_and_bank_alike(tmp_path: Path, clip: Clip, known_set: Path) -> None:
    """A limit thins queries and bank alike and a sample the queries."""
    table = load_benchmark(bench(tmp_path, f"key: known, group: source, path: {known_set}"))
    outcome = evaluate(clip, table, tmp_path / "a", replace(SETTINGS, limit=9))
    assert (outcome.results["known"]["n"], outcome.results["known"]["bank"]) == (9, 14)
    assert "of a bank for K-NN the same share" in format_summary(outcome.summary)
    drawn = load_benchmark(bench(tmp_path, f"key: known, group: source, path: {known_set}, sample: 20"))
    result = evaluate(clip, drawn, tmp_path / "b", SETTINGS).results["known"]
    assert (result["n"], result["bank"]) == (20, 70)
    low, high = result["interval"]
    assert low < result["value"] < high


def test_what_the_model_knew_counts_as_forgotten(
    tmp_path: Path,
    make_run: Callable[..., Path],
    benchmark_file: Path,
    known_set: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "runs" / "mine", kind="full")
    file = tmp_path / "with_source.yaml"
    file.write_text(
        f"root: {known_set.parent}\ninclude: {benchmark_file}\n"
        f"datasets: [{{key: known, group: source, path: {known_set.name}, neighbours: 5}}]\n"
    )
    assert evaluate_command(run, EvalRequest(benchmark=file, datasets=["ours", "known"], workers=0)) == 0
    printed = capsys.readouterr()
    assert [line.split()[:3] for line in printed.out.splitlines() if line.startswith("source")] == [
        ["source", "known", "acc1"],
        ["source", "mean", "with"],
    ]
    assert "untouched model: known: acc1" in printed.err
    summary = read_summary(run / "eval")
    source = summary["groups"]["source"]
    assert summary["forgetting"] == pytest.approx(-source["change"])
    base = tmp_path / "runs/baselines" / summary["base_digest"][:16]
    assert source["mean"] - source["change"] == pytest.approx(read_summary(base)["groups"]["source"]["mean"])
    assert '"eval/known/acc1"' in (run / "journal.jsonl").read_text()
    curve = evaluate_strength(
        run, load_benchmark(file), run / "eval", SETTINGS, baselines=tmp_path / "runs/baselines", alphas=(0, 0.5, 1),
        datasets=["ours", "known"],
    )  # fmt: skip
    assert curve["groups"]["1"]["source"] == source["mean"]
    assert curve["groups"]["0"]["source"] == pytest.approx(source["mean"] - source["change"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("group: source, path: a, bank: test", "every image of 'test' would find itself"),
        ("group: source, path: a, bank: null", "group 'source' is K-NN: bank should name a split"),
        ("group: source, path: a, templates: simple", "a row with a bank is K-NN"),
        ("group: retrieval, path: a, bank: train", "a row with a bank is K-NN"),
        ("group: id, path: a, neighbours: 3", "neighbours: for K-NN, which a row with a bank is"),
        ("group: source, path: a, temperature: 0", "temperature"),
        ("group: source, path: a, neighbours: 0", "neighbours"),
        ("group: source, path: a, resize: crop", "resize"),
        ("group: source, path: a, published_of: {dino: {acc1: 87}}", "tolerance"),
    ],
)
def test_a_row_that_means_nothing_is_refused(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_benchmark(bench(tmp_path, f"key: a, {row}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("bank: valid", "a: its bank: .*no valid/nshards.txt"),
        ("bank_images: 71", "a: 70 images in .*/train, its bank, where 71 are expected"),
        ("images: 44", "a: 45 images in .* where 44 are expected"),
        ("classes: 13", "12 lines in classnames.txt .* where 13 are expected"),
        ("resize: 31", "resize: 31 is less than the 32 pixels that the model takes"),
    ],
)
def test_a_set_that_is_not_what_its_row_says_is_refused(
    tmp_path: Path, clip: Clip, known_set: Path, more: str, message: str
) -> None:
    table = load_benchmark(bench(tmp_path, f"key: a, group: source, path: {known_set}, {more}"))
    with pytest.raises(ConfigError, match=message):
        evaluate(clip, table, tmp_path / "out", SETTINGS)


def test_a_bank_needs_neither_names_nor_templates(
    tmp_path: Path, clip: Clip, make_classification: Callable[..., Path]
) -> None:
    for split in ("test", "train"):
        folder = make_classification(tmp_path / "wds_a", n=20, shards=1, seed=len(split), split=split)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / name).unlink()
    table = load_benchmark(bench(tmp_path, "key: a, group: source, path: wds_a"))
    result = evaluate(clip, table, tmp_path / "out", SETTINGS).results["a"]
    largest = max(max(open_eval_set(folder, split=split).labels) for split in ("test", "train"))
    assert result["classes"] == largest + 1


def test_published_numbers_are_the_models_own(tmp_path: Path, clip: Clip, known_set: Path) -> None:
    published = "published: {acc1: 1, tolerance: 0.1}, published_of: {dino: {acc1: 2, tolerance: 0.1}}"
    table = load_benchmark(bench(tmp_path, f"key: a, group: source, path: {known_set}, {published}"))
    results = evaluate(clip, table, tmp_path / "out", SETTINGS).results
    assert not list(blocks(clip.model))
    assert "published 1.00," in compare_with_published(table, results)[0].text
    results["a"]["model"] = "dino"
    assert "published 2.00," in compare_with_published(table, results)[0].text
