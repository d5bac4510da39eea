"""What every test stands on: a quiet CPU environment, settled before torch or mlflow is imported anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two threads per process times several ranks on two cores is slower than one, and changes the order of sums.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _inherited in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_TRACKING_URI"):
    os.environ.pop(_inherited, None)

# What a test decodes must not lie in the user's cache; all processes of a session share one.
_own_cache = "SELORA_CACHE" not in os.environ
if _own_cache:
    os.environ["SELORA_CACHE"] = tempfile.mkdtemp(prefix="selora-cache-")

REPOSITORY = Path(__file__).parent.parent


def pytest_unconfigure() -> None:
    """Remove the session's cache, by the process that made it."""
    if _own_cache:
        shutil.rmtree(os.environ["SELORA_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """make(size) -> a file system of its own, as in "128k"; skips where none can be mounted."""
    folder = tmp_path / "small"

    def make(size: str) -> Path:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make(classes=3, each=8, size=32, seed=0) -> an ImageFolder of seeded noise over one colour per class, JPEG."""

    def make(classes: int = 3, each: int = 8, size: int = 32, seed: int = 0) -> Path:
        import numpy as np
        from PIL import Image

        root = tmp_path_factory.mktemp("images")
        draw = np.random.default_rng(seed)
        for label in range(classes):
            folder = root / f"class_{label}"
            folder.mkdir()
            colour = draw.integers(0, 256, 3)
            for index in range(each):
                pixels = np.clip(colour + draw.normal(0, 24, (size, size, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index:03d}.jpg")
        return root

    return make
