"""Where the numbers of a run are told to, beside its own log."""

from typing import Literal, Self

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import Block, SecretKey


class Wandb(Block):
    """A run of Weights & Biases."""

    project: str = Field(min_length=1, max_length=128)
    """Project that the run belongs to."""
    entity: str | None = None
    """Team or user that owns the project; unset means the key's own default."""
    mode: Literal["Online", "Offline"] = "Online"
    """Online sends as training goes on; Offline writes a folder into the run's folder, for `wandb sync`."""
    group: str | None = None
    """Group of runs that it belongs to."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    api_key_secret: SecretKey | None = None
    """Key of the service; unset uses WANDB_API_KEY if there is one."""
    base_url: str | None = Field(default=None, pattern=r"^https?://")
    """URL of a server of one's own; unset means the public service."""


class Mlflow(Block):
    """A run of MLflow."""

    tracking_uri: str = Field(pattern=r"^(https?://[^/]|file:///)")
    """The tracking server, or file:///path for a folder of this machine."""
    experiment: str = Field(min_length=1, max_length=256)
    """Experiment that the run belongs to; made if it is not there."""
    token_secret: SecretKey | None = None
    """Bearer token of the server; unset uses MLFLOW_TRACKING_TOKEN if there is one."""


class TensorBoard(Block):
    """Event files in the run's folder."""


class Tracking(Block):
    """Trackers of the run; one at least."""

    wandb: Wandb | None = None
    """Weights & Biases."""
    mlflow: Mlflow | None = None
    """MLflow."""
    tensorboard: TensorBoard | None = None
    """TensorBoard."""

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        if not (self.wandb or self.mlflow or self.tensorboard):
            raise ValueError("must have wandb, mlflow or tensorboard, got none of them")
        return self
