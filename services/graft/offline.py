"""No library calls anybody by itself: each that would is told not to, in each process, before it is imported.

Graft fetches only what it is asked for: a base model from the hub (`graft models pull`, the exception here), data from
an address that a user gives, a grader that a job names.

Owns the variables. They hold in child processes too, Ray's workers among them.
"""

import os

ENVIRONMENT = {
    # MLflow, vLLM and Hugging Face's libraries honour it (https://donottrack.sh); their own switches are for the rest.
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # A base model is a folder on this machine; transformers would ask the hub about some tokenizers all the same.
    "HF_HUB_OFFLINE": "1",
}


def stay() -> None:
    """Sets the variables in this process, whatever they were: a self-hosted platform does not report on its users."""
    os.environ.update(ENVIRONMENT)


def stay_but_for_the_hub() -> None:
    """The same, and leaves HF_HUB_OFFLINE as the user has set it: for `graft models pull` alone."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"})
