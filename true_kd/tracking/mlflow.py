"""MLflow: the server that MLFLOW_TRACKING_URI names, else a database in the output folder.

Through the client, not the fluent interface: that one tags each run with user, program and git commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from true_kd.tracking.runs import PROJECT, Run, Tracker, Value

_DATABASE = "mlflow.db"
_ID = "true_kd.run"
"""The tag by which a run that goes on is found again."""


def start(run: Run) -> Tracker:
    """Begin a run, or go on with that of the same id."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.root.resolve() / _DATABASE}"
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = client.get_experiment_by_name(name)
    place = client.create_experiment(name) if experiment is None else experiment.experiment_id
    earlier = client.search_runs([place], f"tags.`{_ID}` = '{run.id}'", max_results=1) if run.made else []
    if earlier:
        client.update_run(earlier[0].info.run_id, status="RUNNING")
        return _MLflow(client, earlier[0].info.run_id)
    began = client.create_run(place, run_name=run.name, tags={_ID: run.id}).info.run_id
    for setting, value in run.settings.items():
        client.log_param(began, setting, value)
    return _MLflow(client, began)


class _MLflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=batch)
        self._step = step

    def finish(self, summary: Mapping[str, Value], failed: bool) -> None:
        for name, value in summary.items():
            if isinstance(value, str):
                self._client.set_tag(self._run_id, name, value)
            else:
                self._client.log_metric(self._run_id, name, value, step=self._step)
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
