"""The config file of a run: one complete YAML, checked as a whole before anything is loaded.

The operator renders it from a FineTuneJob and `kubetune run` writes the same; a person clones one of `recipes/configs`.
Its keys are the FineTuneJob's own words in snake_case. Nothing here imports torch: a wrong config is refused at once.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kubetune_trainer.errors import ConfigError

Uri = Annotated[str, Field(pattern=r"^(s3://[^/]+|pvc://[^/]+|file://.)", max_length=1024)]
"""s3://bucket/path, pvc://claim/path, or file://path (from the working directory unless it starts with a slash)."""

ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=63)]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def _check_one_of(block: BaseModel, *fields: str, optional: bool = False) -> None:
    given = [field for field in fields if getattr(block, field) is not None]
    if len(given) > 1 or (not given and not optional):
        told = " and ".join(given) if given else "none"
        raise ValueError(f"takes exactly one of {', '.join(fields)}, got {told}")


def _check_unique_names(what: str, items: Sequence[Any]) -> None:
    names = [item.name for item in items]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"must have {what} with names of their own, got {', '.join(twice)} twice")


class SecretKey(_Block):
    """One key of a Secret, mounted as a file."""

    name: str
    """Name of the Secret."""
    key: str
    """Key in the Secret."""


class SecretName(_Block):
    """A whole Secret, mounted as a folder."""

    name: str
    """Name of the Secret."""


class ConfigMapKey(_Block):
    """One key of a ConfigMap, mounted as a file."""

    name: str
    """Name of the ConfigMap."""
    key: str
    """Key in the ConfigMap."""


class CaBundle(_Block):
    """Certificates to trust beside the system's."""

    config_map: ConfigMapKey
    """The ConfigMap that holds the bundle, in PEM."""


class S3Storage(_Block):
    """How to reach one S3 service."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """URL of the service; unset means AWS."""
    region: str | None = None
    """Region of the buckets; unset leaves it to boto3's own chain."""
    credentials_secret: SecretName | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; unset leaves it to boto3's own chain."""
    ca_bundle: CaBundle | None = None
    """Certificates for an endpoint whose authority the system does not know."""


class Storage(_Block):
    """Where URIs lead when they say nothing themselves."""

    s3: S3Storage | None = None
    """The S3 service of every s3:// URI that brings none of its own."""


class HubModel(_Block):
    """A repository of the Hugging Face Hub."""

    repo: str = Field(min_length=1)
    """Owner and name, as in HuggingFaceTB/SmolLM2-135M-Instruct."""
    revision: str = "main"
    """Branch, tag or commit; prepare fixes it to a commit."""
    token_secret: SecretKey | None = None
    """Token for private or gated repositories; unset uses HF_TOKEN if there is one."""


class HubSource(HubModel):
    """A dataset of the Hugging Face Hub."""

    config: str | None = None
    """Name of the dataset's configuration; unset means its only or default one."""
    split: str = "train"
    """Split, with an optional slice as in train[:95%]."""


class UriSource(_Block):
    """A file or folder in an object store, a volume or the local file system."""

    location: Uri
    """Where it is."""
    s3: S3Storage | None = None
    """The S3 service, where it differs from storage.s3."""


class Model(_Block):
    """The model to start from: exactly one of hub, uri."""

    hub: HubModel | None = None
    """A repository of the Hugging Face Hub."""
    uri: UriSource | None = None
    """A folder in Hugging Face format."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _check_one_of(self, "hub", "uri")
        return self


class Source(_Block):
    """One dataset: exactly one of hub, uri, config_map."""

    name: ResourceName
    """Its name in messages and statistics."""
    hub: HubSource | None = None
    """A dataset of the Hugging Face Hub."""
    uri: UriSource | None = None
    """A json, jsonl or parquet file, or a folder of them."""
    config_map: ConfigMapKey | None = None
    """A key of a ConfigMap, for small data."""
    format: Literal["Auto", "Alpaca", "Messages", "PromptCompletion", "Text"] = "Auto"
    """The shape of a record; Auto decides by its columns."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """From the format's field to the data's own column, where the names differ."""
    weight: float = Field(default=1.0, gt=0)
    """How often the source appears in an epoch."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _check_one_of(self, "hub", "uri", "config_map")
        return self


class Validation(_Block):
    """What is held out: exactly one of fraction, sources."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """The part of every source that is held out."""
    sources: tuple[Source, ...] | None = Field(default=None, min_length=1)
    """Datasets of their own."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        _check_one_of(self, "fraction", "sources")
        return self


class Dataset(_Block):
    """What is trained on, and how records become rows of tokens."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """The datasets, mixed by weight."""
    validation: Validation | None = None
    """What is held out; unset means no validation loss."""
    chat_template: str | None = None
    """A jinja template; unset uses the model's own."""
    max_sequence_length: int = Field(default=2048, ge=8)
    """Length of a row, in tokens."""
    overlong: Literal["Truncate", "Split", "Drop", "Fail"] = "Truncate"
    """What happens to a sample that is longer."""
    packing: Literal["BestFit", "None"] = "BestFit"
    """Whether samples share a row; attention never crosses from one to the next."""
    train_on: Literal["Assistant", "LastAssistant", "All"] = "Assistant"
    """Which tokens carry loss."""

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        _check_unique_names("sources", self.sources)
        return self


class Lora(_Block):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1)
    """Inner dimension of an adapter."""
    alpha: float = Field(default=32, gt=0)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    """Names of linear modules, or all-linear for every one but the output head."""


class Training(_Block):
    """How long and how the optimizer steps: exactly one of epochs, max_steps."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step, over all ranks; divisible by ranks x micro_batch_size."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per forward pass of one rank."""
    optimizer: Literal["AdamW"] = "AdamW"
    """The optimizer."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest learning rate of the schedule."""
    scheduler: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    precision: Literal["BF16Mixed", "BF16", "FP32"] = "BF16Mixed"
    """BF16Mixed keeps trained weights and optimizer in fp32 and computes in bf16."""
    activation_checkpointing: Literal["None", "Full"] = "None"
    """Full recomputes every block in the backward pass."""
    seed: int = Field(default=42, ge=0)
    """Decides data order, adapters' first values and dropout."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between validation passes; unset means one, after the last step."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        _check_one_of(self, "epochs", "max_steps")
        return self


class Workspace(_Block):
    """The durable place of runs and caches."""

    uri: Uri
    """A folder; runs and the cache lie below it."""


class ResumeFrom(_Block):
    """Another run's state to begin with."""

    uri: Uri
    """A checkpoint (…/checkpoints/step-100) or a folder of them, whose newest complete one is taken."""


class Checkpoint(_Block):
    """When the state is saved and how much of it is kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints."""
    every_seconds: int | None = Field(default=None, ge=1)
    """Seconds between checkpoints; with every_steps, whichever comes first."""
    keep: int = Field(default=3, ge=1)
    """How many complete checkpoints stay."""
    mode: Literal["Async", "Sync"] = "Async"
    """Async copies the state and goes on training while it is written and uploaded."""
    resume_from: ResumeFrom | None = None
    """Where to begin when this run has no checkpoint of its own."""


class Output(_Block):
    """One thing that the run leaves behind."""

    name: ResourceName
    """Its name in the status and its folder in the workspace."""
    type: Literal["HuggingFace", "PEFT"]
    """HuggingFace is a complete model with adapters merged; PEFT is the adapter alone."""
    uri: Uri | None = None
    """Where it goes; unset means outputs/<name> in the run's directory."""
    dtype: Literal["Source", "BF16", "FP32"] = "Source"
    """Type of a HuggingFace output's weights; Source keeps the base model's."""


class Run(_Block):
    """Which run this is and where its things lie; written by the operator, filled in for runs by hand."""

    namespace: str = "local"
    """Namespace of the FineTuneJob."""
    name: str
    """Name of the FineTuneJob; by hand the config file's stem."""
    uid: str = "local"
    """UID of the FineTuneJob."""
    directory: Uri
    """Folder of this run's checkpoints, logs and outputs."""
    cache: Uri
    """Folder of models and tokenized data, shared between runs."""
    num_nodes: int = Field(default=1, ge=1)
    """Pods that train."""
    processes_per_node: int = Field(default=1, ge=1)
    """Ranks in each."""


class FineTuneConfig(_Block):
    """A whole run."""

    api_version: Literal["kubetune.dev/v1alpha1"] = "kubetune.dev/v1alpha1"
    """Version of the API whose words these are."""
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    """Kind of the job."""
    run: Run
    """Which run this is."""
    model: Model
    """The model to start from."""
    dataset: Dataset
    """What is trained on."""
    recipe: Literal["SFT"] = "SFT"
    """The training objective: supervised fine-tuning."""
    tuning: Literal["LoRA", "Full"] = "LoRA"
    """Which weights are trained."""
    lora: Lora | None = None
    """The adapters; defaulted with tuning LoRA, refused with Full."""
    training: Training
    """How long and how the optimizer steps."""
    storage: Storage = Storage()
    """Where URIs lead when they say nothing themselves."""
    workspace: Workspace
    """The durable place of runs and caches."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    outputs: tuple[Output, ...] = ()
    """What the run leaves behind."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.tuning == "Full" and self.lora is not None:
            raise ValueError("lora must not be set with tuning Full")
        adapters = [output.name for output in self.outputs if output.type == "PEFT"]
        if self.tuning == "Full" and adapters:
            raise ValueError(f"outputs of type PEFT need tuning LoRA, got output {adapters[0]} with tuning Full")
        _check_unique_names("outputs", self.outputs)
        return self

    @property
    def title(self) -> str:
        """The run as messages name it: kind, namespace and name."""
        return f"{self.kind} {self.run.namespace}/{self.run.name}"

    def accumulation_steps(self, world_size: int) -> int:
        """The micro batches of one rank in an optimizer step.

        Raises:
            ConfigError: The global batch size cannot be divided; names the nearest that can.
        """
        unit = world_size * self.training.micro_batch_size
        size = self.training.global_batch_size
        if size % unit == 0:
            return size // unit
        nearest = [str(valid) for valid in (size // unit * unit, (size // unit + 1) * unit) if valid]
        raise ConfigError(
            f"{self.title}: training.global_batch_size must be divisible by ranks x training.micro_batch_size"
            f" = {world_size} x {self.training.micro_batch_size} = {unit}, got {size}",
            hint=f"Set training.global_batch_size to {' or '.join(nearest)}.",
        )

    def training_digest(self) -> str:
        """A digest of what decides the numbers of the run; where it lies and what it exports do not."""
        decides = self.model_dump(mode="json", include={"model", "dataset", "recipe", "tuning", "lora", "training"})
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.2), not the string that YAML 1.1 makes of it."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> FineTuneConfig:
    """Reads, completes and checks a config file.

    Args:
        path: The YAML file.
        overrides: `a.b=c` each, the value in YAML, as in training.max_steps=10 or dataset.sources.0.weight=2.

    Raises:
        ConfigError: The file cannot be read, or a field breaks a rule; every broken rule is named.
    """
    path = Path(path)
    values = _read(path)
    for override in overrides:
        _apply_override(values, override)
    _fill_in_run(values, path)
    if values.get("tuning", "LoRA") == "LoRA":
        values["lora"] = values.get("lora") or {}
    try:
        return FineTuneConfig.model_validate(values)
    except ValidationError as error:
        raise _config_error(values["run"], error.errors()) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must be a mapping, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form field=value, as in training.max_steps=10")
    *parents, last = key.split(".")
    at: Any = values
    try:
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else _descend(at, name)
        at[int(last) if isinstance(at, list) else last] = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"override {override!r}: {key} does not lead to a field ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _descend(values: dict[str, Any], name: str) -> Any:
    if values.get(name) is None:
        values[name] = {}
    return values[name]


def _fill_in_run(values: dict[str, Any], path: Path) -> None:
    """Completes a config that a person wrote: names, folders, and ranks as torchrun tells them."""
    run = values.setdefault("run", {})
    workspace = values.setdefault("workspace", {"uri": f"file://{Path.cwd()}/runs"})
    if not isinstance(run, dict) or not isinstance(workspace, dict):
        return  # refused by the models, with the field's name
    root = str(workspace.get("uri", "")).rstrip("/")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    run.setdefault("name", path.stem)
    run.setdefault("directory", f"{root}/{run['name']}")
    run.setdefault("cache", f"{root}/cache")
    run.setdefault("num_nodes", max(1, world // local))
    run.setdefault("processes_per_node", local)


def _config_error(run: Any, errors: Sequence[ErrorDetails]) -> ConfigError:
    named = run if isinstance(run, dict) else {}
    title = f"FineTuneJob {named.get('namespace', 'local')}/{named.get('name', '')}"
    # A list with a wrong item is also reported as too short; only the item is the person's mistake.
    told = [e for e in errors if not any(o["loc"][: len(e["loc"])] == e["loc"] and o is not e for o in errors)]
    problems = [_describe(error) for error in told or errors]
    return ConfigError(f"{title}: " + "; ".join(problems), hint="Correct the named fields of the config.")


def _describe(error: ErrorDetails) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{field} is not a field{_did_you_mean(error['loc'])}"
    if error["type"] == "missing":
        return f"{field} is required"
    if error["type"] == "value_error":
        return f"{field} {error['ctx']['error']}".strip()
    return f"{field} {error['msg'].replace('Input should', 'must')}, got {error['input']!r}"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    """The nearest field of the same block, as a question; empty when none is near."""
    block: Any = FineTuneConfig
    for part in location[:-1]:
        if isinstance(part, str) and hasattr(block, "model_fields"):
            block = _block_of(block.model_fields[part].annotation)
    known = list(getattr(block, "model_fields", ()))
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", str(location[-1])).lower()
    near = difflib.get_close_matches(snake, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _block_of(annotation: Any) -> Any:
    """The model class inside an annotation like Lora | None or tuple[Source, ...] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _block_of(inner)
        if found is not None:
            return found
    return None
