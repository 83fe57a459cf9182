"""Trackers of a run: Weights & Biases, MLflow and TensorBoard."""

from typing import Annotated, Literal

from pydantic import Field

from kubetune_operator.api.common import Endpoint, SecretKeyRef, matches
from kubetune_operator.api.model import ApiModel, Rule, Unique

Label = Annotated[
    str,
    Field(min_length=1, max_length=128),
    matches(r"[-_.a-zA-Z0-9]+( [-_.a-zA-Z0-9]+)*", message="must consist of letters, digits, '-', '_', '.' and spaces"),
]


class Wandb(ApiModel):
    """A run of Weights & Biases. Later attempts go on with it."""

    rules = (
        Rule(
            cel="self.mode == 'Offline' || has(self.apiKeySecret)",
            message="apiKeySecret is required with mode: Online",
            check=lambda value: value.mode == "Offline" or value.api_key_secret is not None,
        ),
    )

    project: Label
    """Project that the run belongs to."""
    entity: Label | None = None
    """Team or user that owns the project. Unset: the default of the key's owner."""
    mode: Literal["Online", "Offline"] = "Online"
    """Online: numbers are sent as training goes on. Offline: a folder for wandb sync is written into the run's folder
    of the workspace, and no network is needed."""
    group: Label | None = None
    """Group of runs that this one belongs to. Unset: none."""
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=16), Unique()] | None = (
        None
    )
    """Tags of the run. Unset: none."""
    api_key_secret: SecretKeyRef | None = None
    """Secret and key with the API key. Required with mode: Online."""
    base_url: Endpoint | None = None
    """URL of a server of your own. Unset: the public service."""


class Mlflow(ApiModel):
    """A run of MLflow. Later attempts go on with it."""

    tracking_uri: Annotated[
        str,
        Field(max_length=512),
        matches(
            r"https?://[^/\s]+(/[^\s]*)?|file:///[^\n]+",
            message="must be a URL that starts with http:// or https:// or, for local runs, file:///path",
        ),
    ]
    """URL of the tracking server."""
    experiment: Annotated[str, Field(min_length=1, max_length=256)]
    """Experiment that the run belongs to. It is made if it is not there."""
    token_secret: SecretKeyRef | None = None
    """Secret and key with a bearer token for the server. Unset: no authentication."""


class TensorBoard(ApiModel):
    """Event files in the run's folder of the workspace."""


class Tracking(ApiModel):
    """Where the numbers of a run are told to, beside its log and its status. At least one of its fields is set."""

    rules = (
        Rule(
            cel="has(self.wandb) || has(self.mlflow) || has(self.tensorboard)",
            message="at least one of wandb, mlflow, tensorboard must be set",
            check=lambda value: any((value.wandb, value.mlflow, value.tensorboard)),
        ),
    )

    wandb: Wandb | None = None
    """Weights & Biases."""
    mlflow: Mlflow | None = None
    """MLflow."""
    tensorboard: TensorBoard | None = None
    """TensorBoard: event files under tensorboard/ in the run's folder."""
