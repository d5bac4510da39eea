"""Versions of a registered model: equal weights are registered once; aliases and the history of champions.

A new version becomes the `challenger`, and loses this alias when it becomes the `champion`. The registered model's tag
selora.champions lists all champions, oldest first; `roll_back` goes back in this list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.tracking.mlflow.moved import relocate
from pipeline.tracking.mlflow.store import Away, Gone, MlflowStore, Refused, as_config_errors, client_environment
from pipeline.tracking.served.served import load_served, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER, CHAMPION = "challenger", "champion"
DIGEST_TAG = "selora.weights_digest"
CHAMPIONS_TAG = "selora.champions"
PREVIOUS_TAG = "selora.previous_champion"
REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"
_KEPT_CHAMPIONS = 50
_ELSEWHERE = "; --uri gives the address of another store"
# The upload of a whole CLIP takes longer than that of a metric.
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class Registry:
    """The versions of one registered model in one store. Faults of the store are ConfigErrors that name it.

    It is the store with the runs, whatever MLFLOW_REGISTRY_URI is, because a version links to its run.
    """

    def __init__(self, uri: str, name: str, experiment: str = "selora") -> None:
        if not name or re.search(r"[/:.%\"'\s]", name):
            raise ConfigError(f"name={name!r}: a model name has none of / : . % quotes and spaces")
        self.uri, self.name = uri, name
        self._store = MlflowStore(uri, experiment)

    def run_id_of(self, run: str) -> str | None:
        """The MLflow run in the experiment with this run's uuid, or None."""
        with self._client():
            found = self._store.find_runs(run)
            return found[0].info.run_id if found and found[0].info.lifecycle_stage == "active" else None

    def version_of(self, digest: str) -> str | None:
        """The version with weights of this digest, or None."""
        with self._client() as client:
            found = [v.version for v in self._versions(client) if v.tags.get(DIGEST_TAG) == digest]
            return str(found[0]) if found else None

    def register(self, model: Path, tags: Mapping[str, str], run_id: str | None, description: str = "") -> str:
        """Upload the model directory and create a version with its tags. Returns the version."""
        with self._client() as client:
            experiment_id = self._store.experiment_id(run_id)
            logged = client.create_logged_model(experiment_id, self.name, source_run_id=run_id, tags=dict(tags))
            try:
                _sign(model, logged.model_id, run_id)
                client.log_model_artifacts(logged.model_id, str(model))
                client.finalize_logged_model(logged.model_id, "READY")
                return self._make_version(client, logged.model_id, tags, run_id, description)
            except BaseException:  # also after Ctrl-C: files without a version are never read
                client.delete_logged_model(logged.model_id)
                raise

    def _make_version(
        self, client: MlflowClient, model_id: str, tags: Mapping[str, str], run_id: str | None, description: str
    ) -> str:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            _link(client, run_id, model_id)
        try:
            client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with _default_store(self.uri):  # a database store looks the model up at the default address
            made = client.create_model_version(
                self.name,
                f"models:/{model_id}",
                run_id=run_id,
                tags=dict(tags),
                model_id=model_id,
                description=description,
            )
        return str(made.version)

    def retag(self, version: str, tags: Mapping[str, str]) -> None:
        """Update the tags of a version."""
        with self._client() as client:
            have = client.get_model_version(self.name, version).tags
            for key, value in tags.items():
                if have.get(key) != value:
                    client.set_model_version_tag(self.name, version, key, value)

    def tags(self, version: str) -> dict[str, str]:
        with self._client() as client:
            return dict(client.get_model_version(self.name, version).tags)

    def alias(self, alias: str) -> str | None:
        """The version with the alias, or None."""
        with self._client() as client:
            return self._alias(client, alias)

    def aliases(self, version: str) -> list[str]:
        """The aliases of the version."""
        with self._client() as client:
            return sorted(client.get_model_version(self.name, version).aliases)

    def make_challenger(self, version: str) -> None:
        """Give the version the alias challenger, unless it is the champion."""
        with self._client() as client:
            if self._alias(client, CHAMPION) != version:
                client.set_registered_model_alias(self.name, CHALLENGER, version)

    def make_champion(self, version: str) -> str | None:
        """Move the alias champion to `version`. Returns the previous champion, which is recorded for a rollback."""
        with self._client() as client:
            before = self._alias(client, CHAMPION)
            if before == version:
                return self._before(client, version)
            # The history first: if this process dies in between, the alias still names the champion.
            history = [*self._history(client, before), version][-_KEPT_CHAMPIONS:]
            client.set_registered_model_tag(self.name, CHAMPIONS_TAG, ",".join(history))
            if before is not None:
                client.set_model_version_tag(self.name, version, PREVIOUS_TAG, before)
            client.set_registered_model_alias(self.name, CHAMPION, version)
            if self._alias(client, CHALLENGER) == version:
                client.delete_registered_model_alias(self.name, CHALLENGER)
            return before

    def roll_back(self) -> tuple[str, str]:
        """Return the alias champion to the previous champion. Returns (version before, version now)."""
        with self._client() as client:
            now = self._alias(client, CHAMPION)
            if now is None:
                raise ConfigError(f"{self.name} has no champion at {redact(self.uri)}: nothing to roll back")
            before = self._before(client, now)
            if before is None:
                raise ConfigError(f"{self.name}: version {now} is the first champion, there is none before it")
            client.set_registered_model_alias(self.name, CHAMPION, before)
            kept = self._history(client, now)[:-1]
            client.set_registered_model_tag(self.name, CHAMPIONS_TAG, ",".join(kept))
            return now, before

    def _before(self, client: MlflowClient, version: str) -> str | None:
        present = {str(one.version) for one in self._versions(client)}
        earlier = [one for one in self._history(client, version)[:-1] if one in present]
        return earlier[-1] if earlier else None

    def _history(self, client: MlflowClient, now: str | None) -> list[str]:
        """The champions up to the present one; entries after it, from an interrupted step, are ignored."""
        if now is None:
            return []
        past = client.get_registered_model(self.name).tags.get(CHAMPIONS_TAG, "").split(",")
        while past and past[-1] != now:
            past.pop()
        return past or [now]

    def _alias(self, client: MlflowClient, alias: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.get_model_version_by_alias(self.name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _versions(self, client: MlflowClient) -> Iterator[ModelVersion]:
        token = None
        while True:
            page = client.search_model_versions(f"name = '{self.name}'", page_token=token)
            yield from page
            if not (token := page.token):
                return

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        try:
            with quiet(), client_environment(PATIENT), self._store.calling() as client:
                yield client
        except (Away, Refused, Gone) as error:
            raise ConfigError(f"tracking.uri={redact(self.uri)}: {error}") from error


def load_registered(model_uri: str, uri: str) -> Any:
    """Load a model by models:/NAME@champion, models:/NAME/3, runs:/… or a directory, as `mlflow.pyfunc.load_model`."""
    with (
        as_config_errors(uri, f"{model_uri}: cannot be loaded from ", _ELSEWHERE),
        client_environment(PATIENT),
        _default_store(uri),
    ):
        relocate(uri)
        return load_served(model_uri)


def registered_files(model_uri: str, uri: str, folder: Path) -> Path:
    """Download a registered model's files into `folder`. Returns its directory; names as in `load_registered`."""
    import mlflow

    with (
        as_config_errors(uri, f"{model_uri}: cannot be loaded from ", _ELSEWHERE),
        client_environment(PATIENT),
        _default_store(uri),
        quiet(),
    ):
        relocate(uri)
        return Path(mlflow.artifacts.download_artifacts(model_uri, dst_path=str(folder)))


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Set MLflow's process-wide default addresses for a block; MLflow also writes them into the environment."""
    import mlflow

    variables = ("MLFLOW_TRACKING_URI", REGISTRY_VARIABLE)
    inherited = {name: os.environ[name] for name in variables if name in os.environ}
    before: Any = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    nothing: Any = None
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_registry_uri(nothing)  # back to the environment's address, or else the tracking address
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(inherited)


def _sign(model: Path, model_id: str, run_id: str | None) -> None:
    """Record in the model its logged model and run."""
    from mlflow.models import Model

    signed = Model.load(str(model))
    signed.model_id, signed.model_uuid, signed.run_id = model_id, model_id, run_id
    signed.save(str(model / "MLmodel"))


def _link(client: MlflowClient, run_id: str, model_id: str) -> None:
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run_id, models=[LoggedModelOutput(model_id, step=0)])
