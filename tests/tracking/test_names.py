from __future__ import annotations

import pytest

from pipeline.tracking.mlflow.store import legal_name, legal_param

NAMES = [
    "loss", "eval/demo/image_retrieval_recall@5", "r@1", "r%1", "r#1", "gate/image.3.q_proj", "a//b", "/a", "a/",
    "../a", ".", "", "ä", "x" * 300, "x" * 301, "a\nb", "[N/A]", "..", "a/../b", "a/./b", "lr (1e-5)",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mlflow_takes_every_name(name: str) -> None:
    """MLflow's own checks raise for a name that it does not take."""
    from mlflow.utils.validation import _validate_metric, _validate_param, _validate_tag

    legal = legal_name(name)
    _validate_metric(legal, 1.0, 0, 0)
    _validate_param(legal, "x")
    _validate_tag(legal, "x")
    assert legal_name(legal) == legal


def test_different_names_stay_different() -> None:
    """Different names stay different and legal ones stay themselves."""
    assert len({legal_name(name) for name in NAMES}) == len(NAMES)
    assert legal_name("r@1") == "r_at_1"
    assert legal_name("eval/demo/acc1") == "eval/demo/acc1"


def test_long_param_value_is_cut_to_what_mlflow_keeps() -> None:
    name, value = legal_param("templates", "y" * 7000)
    assert (name, len(value), value[-1]) == ("templates", 6000, "…")
