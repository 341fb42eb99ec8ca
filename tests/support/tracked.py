"""MLflow's runs of jobs, once they are whole: what an orchestrator has for them it sends beside the job, also after its
end.
"""

from mlflow import MlflowClient
from mlflow.entities import Run

from tests.support.whole_stack import eventually


def finished_run(client: MlflowClient, run_id: str) -> Run:
    """The run of a job that has succeeded, as soon as it says so too: that is the last that is written of it."""
    return eventually(
        lambda: client.get_run(run_id), lambda run: run.info.status == "FINISHED", 60, f"{run_id} is finished"
    )


def curve(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric of such a run."""
    history = client.get_metric_history(finished_run(client, run_id).info.run_id, name)
    return sorted((point.step, point.value) for point in history)
