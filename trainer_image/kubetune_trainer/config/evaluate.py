"""The config of an EvalJob."""

from typing import Literal, Self

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import (
    Block,
    JobConfig,
    ResourceName,
    Uri,
    UriSource,
    check_one_of,
    check_unique_names,
)


class Task(Block):
    """One task, or a group of tasks, of lm_eval or of the task files."""

    name: str = Field(min_length=1)
    """Its name, as in hellaswag."""
    num_fewshot: int | None = Field(default=None, ge=0, le=64)
    """Solved examples before each question; unset leaves it to the task."""
    limit: int | None = Field(default=None, ge=1)
    """Only so many samples of it, from the first on; of a group, so many of each of its tasks. Unset means all."""


class ConfigMapName(Block):
    """A whole ConfigMap, mounted as a folder."""

    name: str
    """Name of the ConfigMap."""


class TaskFiles(Block):
    """A folder with lm_eval's task YAML and the data next to it: exactly one of config_map, uri."""

    name: ResourceName
    """Its name in messages."""
    config_map: ConfigMapName | None = None
    """A ConfigMap whose keys are the files."""
    uri: UriSource | None = None
    """A folder."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_one_of(self, "config_map", "uri")
        return self


class ComparedTo(Block):
    """Another EvalJob and how far this one may fall behind it: exactly one of max_drop, max_increase."""

    name: str
    """Name of the EvalJob."""
    directory: Uri
    """Its run's folder."""
    max_drop: float | None = Field(default=None, ge=0)
    """How much lower the metric may be, for metrics that should be high."""
    max_increase: float | None = Field(default=None, ge=0)
    """How much higher the metric may be, for metrics that should be low."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        check_one_of(self, "max_drop", "max_increase")
        return self


class Gate(Block):
    """What a metric must reach: exactly one of at_least, at_most, compared_to."""

    name: ResourceName
    """Its name in the status."""
    task: str = Field(min_length=1)
    """The task, or the group of tasks; with compared_to a task."""
    metric: str = Field(min_length=1)
    """The task's metric, as in acc."""
    filter: str = "none"
    """The filter that the answers went through; none is the one of tasks without filters."""
    at_least: float | None = None
    """The lowest value that passes."""
    at_most: float | None = None
    """The highest value that passes."""
    compared_to: ComparedTo | None = None
    """Another EvalJob with the same samples and settings."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        check_one_of(self, "at_least", "at_most", "compared_to")
        return self


class EvalConfig(JobConfig):
    """A whole evaluation."""

    kind: Literal["EvalJob"] = "EvalJob"
    """Kind of the job."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """What the model is asked."""
    task_files: tuple[TaskFiles, ...] = ()
    """Tasks of one's own, beside lm_eval's; of two with the same name the last one counts."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of one forward pass; a row may hold several requests that begin alike."""
    max_sequence_length: int | None = Field(default=None, ge=8)
    """Longest context in tokens, longer ones lose their beginning; unset means the model's own limit."""
    apply_chat_template: bool = False
    """Whether questions go through the model's chat template."""
    system_instruction: str | None = Field(default=None, min_length=1)
    """A system message, or the text before everything where no chat template is applied."""
    seed: int = Field(default=1234, ge=0)
    """Decides which solved examples are shown, and drawn answers."""
    gates: tuple[Gate, ...] = ()
    """What the results must reach; a gate that fails does not fail the job."""

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        check_unique_names("tasks", self.tasks)
        check_unique_names("task_files", self.task_files)
        check_unique_names("gates", self.gates)
        return self
