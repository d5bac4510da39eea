"""The commands embed and search: vectors of images and texts, and nearest neighbours among them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.cli.options import FAILED, OK, add_command, count
from pipeline.config import ConfigError

_MODEL = "directory of a run or of an export (open_clip, timm, onnx), models:/NAME@ALIAS, or a name as in model.name"
_SHOWN = 20


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    _add_embed(commands)
    _add_search(commands)


def _add_embed(commands: Any) -> None:
    parser = add_command(
        commands,
        "embed",
        run_embed,
        "write unit vectors of images or texts; the same command continues an interrupted one",
        "selora embed runs/my_run photos/ photos.parquet",
        "selora embed models:/my-clip@champion captions.txt captions.npy --texts",
        "torchrun --nproc-per-node 8 -m pipeline embed runs/my_run shards/train train.npy",
    )
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument(
        "source", help="folder of images, table (csv, json), shards or tars, or - for paths from standard input"
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="new file, .parquet (key, vector) or .npy (keys in a .json)"
    )
    parser.add_argument(
        "--texts",
        action="store_true",
        help="embed texts: lines of a .txt file or of -, a column, captions",
    )
    parser.add_argument("--image-column", metavar="NAME", help="csv, json: column with image paths")
    parser.add_argument("--caption-column", metavar="NAME", help="csv, json: column with texts")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="csv, json: folder of relative image paths")
    parser.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="images or texts per forward pass (default: 64)"
    )
    parser.add_argument("--workers", type=count, default=4, metavar="N", help="decoding threads per rank (default: 4)")
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", metavar="TAG", help="open_clip tag or weights file of a plain model")
    parser.add_argument("--uri", help="store of models:/ (default: MLFLOW_TRACKING_URI, or runs/mlflow.db)")
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: this rank's GPU if there is one)"
    )


def run_embed(arguments: argparse.Namespace) -> int:
    from pipeline.data.sources.sample import SourceOptions
    from pipeline.evaluation.measures.ranks import launched_ranks
    from pipeline.vectors.embed import embed
    from pipeline.vectors.items import STDIN, images_of, texts_of
    from pipeline.vectors.store import check_suffix

    check_suffix(arguments.out)
    options = SourceOptions(
        image_column=arguments.image_column, caption_column=arguments.caption_column, image_root=arguments.image_root
    )
    read = texts_of if arguments.texts else images_of
    with launched_ranks() as ranks:
        # only rank 0 has the standard input
        items = ranks.from_first(lambda: read(STDIN, options)) if arguments.source == STDIN else None
        embedder = _embedder(arguments, arguments.model)
        done = embed(
            embedder,
            read(arguments.source, options) if items is None else items,
            "texts" if arguments.texts else "images",
            arguments.out,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            say=lambda line: print(f"embed: {line}", file=sys.stderr, flush=True),
        )
        if ranks.rank == 0:
            for name, fault in list(done.left_out.items())[:_SHOWN]:
                print(f"selora embed: {name}: {fault}", file=sys.stderr)
            print(done)
    return FAILED if done.left_out else OK


def _embedder(arguments: argparse.Namespace, model: str) -> Any:
    from pipeline.vectors.embedder import load_embedder

    return load_embedder(model, pretrained=arguments.pretrained, uri=arguments.uri, device=arguments.device)


def _add_search(commands: Any) -> None:
    parser = add_command(
        commands,
        "search",
        run_search,
        "print the vectors of a file that are nearest to a text or an image",
        "selora search photos.parquet 'a red shoe'",
        "selora search photos.parquet new.jpg --top 20",
        text_only=True,
    )
    parser.add_argument("vectors", type=Path, metavar="VECTORS", help="file that `selora embed` wrote")
    parser.add_argument("question", metavar="TEXT_OR_IMAGE", help="text, or name of an image file")
    parser.add_argument("--top", type=count, default=10, metavar="N", help="number of results (default: 10)")
    parser.add_argument("--with", dest="model", metavar="MODEL", help="new place of the model, if it has moved")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    _add_model_options(parser)


def run_search(arguments: argparse.Namespace) -> int:
    from pipeline.vectors.search import is_image, search
    from pipeline.vectors.store import read_vectors

    found = read_vectors(arguments.vectors)
    if is_image(arguments.question) and not Path(arguments.question).is_file():
        raise ConfigError(f"{arguments.question}: there is no such image")
    embedder = _embedder(arguments, arguments.model or found.model)
    for hit in search(found, embedder, arguments.question, arguments.top):
        if arguments.json:
            print(json.dumps({"key": hit.key, "cosine": round(hit.cosine, 6)}, ensure_ascii=False))
        else:
            print(f"{hit.cosine:.4f}  {hit.key}")
    return OK
