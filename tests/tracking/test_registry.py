"""Versions and aliases in a real store, and the model that is kept there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.tracking.mlflow.registry import CHAMPIONS_TAG, Registry


@pytest.fixture
def model(tmp_path: Path) -> Callable[[], Path]:
    """make() -> a model directory with the MLmodel that a version needs, and a file of weights."""

    def make() -> Path:
        import mlflow
        from mlflow.models import Model

        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        (directory / "weights").write_bytes(b"weights")
        kept = Model()
        mlflow.pyfunc.add_to_model(kept, loader_module="nowhere")
        kept.save(str(directory / "MLmodel"))
        return directory

    return make


def test_aliases_move_from_version_to_version_and_back(store: str, model: Callable[[], Path]) -> None:
    before = os.environ.get("MLFLOW_TRACKING_URI")
    registry = Registry(store, "aliased")
    assert registry.alias("champion") is None
    assert registry.version_of("d1") is None
    with pytest.raises(ConfigError, match="has no champion"):
        registry.roll_back()
    versions = [registry.register(model(), {"selora.weights_digest": f"d{i}"}, None) for i in (1, 2, 3)]
    assert versions == ["1", "2", "3"]
    assert registry.version_of("d2") == "2"
    registry.make_challenger("1")
    assert registry.aliases("1") == ["challenger"]
    assert [registry.make_champion(version) for version in versions] == [None, "1", "2"]
    assert registry.make_champion("3") == "2"  # again: nothing changes
    registry.make_challenger("3")
    assert registry.aliases("3") == ["champion"]
    assert registry.tags("3")["selora.previous_champion"] == "2"
    assert registry.roll_back() == ("3", "2")
    assert registry.make_champion("3") == "2"
    assert [registry.roll_back(), registry.roll_back()] == [("3", "2"), ("2", "1")]
    with pytest.raises(ConfigError, match="version 1 is the first champion"):
        registry.roll_back()
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


def test_a_half_done_promotion_does_not_mislead_rollback(store: str, model: Callable[[], Path]) -> None:
    """A promotion that died before its alias moved does not mislead the rollback."""
    from mlflow import MlflowClient

    registry = Registry(store, "interrupted")
    for digest in ("d1", "d2", "d3"):
        registry.register(model(), {"selora.weights_digest": digest}, None)
    registry.make_champion("1")
    registry.make_champion("2")
    MlflowClient(store).set_registered_model_tag("interrupted", CHAMPIONS_TAG, "1,2,3")
    assert registry.alias("champion") == "2"
    assert registry.roll_back() == ("2", "1")
    MlflowClient(store).set_registered_model_tag("interrupted", CHAMPIONS_TAG, "1,2")
    MlflowClient(store).set_registered_model_alias("interrupted", "champion", "2")
    MlflowClient(store).delete_model_version("interrupted", "1")
    with pytest.raises(ConfigError, match="there is none before it"):
        registry.roll_back()


def test_a_failed_registration_leaves_no_model(store: str, tmp_path: Path) -> None:
    """A registration that fails leaves no model and no version."""
    from mlflow import MlflowClient

    registry = Registry(store, "broken", "broken_experiment")
    with pytest.raises(ConfigError, match="tracking.uri=sqlite"):
        registry.register(tmp_path, {}, None)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("broken_experiment")
    assert experiment is not None
    assert client.search_logged_models([experiment.experiment_id]) == []
    assert registry.version_of("") is None


def test_a_registry_elsewhere_in_the_environment_is_not_used(
    store: str, model: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version links to its run, so it is where the run is; `promote` says that the variable is not used."""
    import mlflow

    from pipeline.handoff.promote import _other_registry

    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", elsewhere)
    registry = Registry(store, "not_elsewhere")
    assert registry.register(model(), {"selora.weights_digest": "d"}, None) == "1"
    assert registry.version_of("d") == "1"
    assert not (tmp_path / "elsewhere.db").exists()
    assert os.environ["MLFLOW_REGISTRY_URI"] == elsewhere
    assert mlflow.get_registry_uri() == elsewhere
    assert _other_registry(store) == [
        f"MLFLOW_REGISTRY_URI={elsewhere} is not used: a version is registered where its run is; see --uri"
    ]
    assert _other_registry(elsewhere) == []


def test_a_store_that_is_away_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="tracking.uri=http://me:\\*\\*\\*@127.0.0.1:9: Connection refused"):
        Registry("http://me:secret@127.0.0.1:9", "any").alias("champion")
