"""The blocks that configs of every kind are made of."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kubetune_trainer.fingerprint import fingerprint

Uri = Annotated[str, Field(pattern=r"^(s3://[^/]+|pvc://[^/]+|file://.)", max_length=1024)]
"""s3://bucket/path, pvc://claim/path, or file://path (from the working directory unless it starts with a slash)."""

ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=63)]


JUDGED: Final = ("Preference", "UnpairedPreference")
"""Formats of answers of which it is known how good they are: no text to compute as it stands."""


class Block(BaseModel):
    """A frozen group of fields; an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


def check_one_of(block: BaseModel, *fields: str, optional: bool = False) -> None:
    """Raises ValueError unless exactly one of the fields is set, or none where that is allowed."""
    given = [field for field in fields if getattr(block, field) is not None]
    if len(given) > 1 or (not given and not optional):
        told = " and ".join(given) if given else "none"
        raise ValueError(f"takes exactly one of {', '.join(fields)}, got {told}")


def check_unique_names(what: str, items: Sequence[Any]) -> None:
    """Raises ValueError if two items have the same name."""
    names = [item.name for item in items]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"must have {what} with names of their own, got {', '.join(twice)} twice")


class SecretKey(Block):
    """One key of a Secret, mounted as a file."""

    name: str
    """Name of the Secret."""
    key: str
    """Key in the Secret."""


class SecretName(Block):
    """A whole Secret, mounted as a folder."""

    name: str
    """Name of the Secret."""


class ConfigMapKey(Block):
    """One key of a ConfigMap, mounted as a file."""

    name: str
    """Name of the ConfigMap."""
    key: str
    """Key in the ConfigMap."""


class CaBundle(Block):
    """Certificates to trust beside the system's."""

    config_map: ConfigMapKey
    """The ConfigMap that holds the bundle, in PEM."""


class S3Storage(Block):
    """How to reach one S3 service."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """URL of the service; unset means AWS."""
    region: str | None = None
    """Region of the buckets; unset leaves it to boto3's own chain."""
    credentials_secret: SecretName | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; unset leaves it to boto3's own chain."""
    ca_bundle: CaBundle | None = None
    """Certificates for an endpoint whose authority the system does not know."""


class Storage(Block):
    """Where URIs lead when they say nothing themselves."""

    s3: S3Storage | None = None
    """The S3 service of every s3:// URI that brings none of its own."""


class HubModel(Block):
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


class UriSource(Block):
    """A file or folder in an object store, a volume or the local file system."""

    location: Uri
    """Where it is."""
    s3: S3Storage | None = None
    """The S3 service, where it differs from storage.s3."""


class Model(Block):
    """The model to start from: exactly one of hub, uri."""

    hub: HubModel | None = None
    """A repository of the Hugging Face Hub."""
    uri: UriSource | None = None
    """A folder in Hugging Face format."""
    adapter: UriSource | None = None
    """A PEFT folder, merged into the model as it is loaded; unset loads the model as it is."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_one_of(self, "hub", "uri")
        return self


class Source(Block):
    """One dataset: exactly one of hub, uri, config_map."""

    name: ResourceName
    """Its name in messages and statistics."""
    hub: HubSource | None = None
    """A dataset of the Hugging Face Hub."""
    uri: UriSource | None = None
    """A json, jsonl, csv (each also as .gz) or parquet file, or a folder of them."""
    config_map: ConfigMapKey | None = None
    """A key of a ConfigMap, for small data."""
    format: Literal[
        "Auto", "Alpaca", "ShareGPT", "Messages", "PromptCompletion", "Text", "Preference", "UnpairedPreference"
    ] = "Auto"  # fmt: skip
    """The shape of a record; Auto decides by its columns."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """From the format's field to the data's own column, where the names differ."""
    weight: float = Field(default=1.0, gt=0)
    """How often the source appears in an epoch."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_one_of(self, "hub", "uri", "config_map")
        return self


class Validation(Block):
    """What is held out: exactly one of fraction, sources."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """The part of every source that is held out."""
    sources: tuple[Source, ...] | None = Field(default=None, min_length=1)
    """Datasets of their own."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        check_one_of(self, "fraction", "sources")
        return self


class Dataset(Block):
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

    @property
    def held_out(self) -> tuple[Source, ...]:
        """The sources of `validation`; none where it is a fraction."""
        return (self.validation and self.validation.sources) or ()

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        check_unique_names("sources", self.sources)
        return self


class Workspace(Block):
    """The durable place of runs and caches."""

    uri: Uri
    """A folder; runs and the cache lie below it."""


class Parent(Block):
    """Another job whose result this one uses."""

    kind: str
    """Its kind."""
    name: str
    """Its name."""
    uid: str
    """Its identity."""
    output: str | None = None
    """Which of its outputs is used; unset where it is no output."""


class Run(Block):
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
    parents: tuple[Parent, ...] = ()
    """Jobs whose results are used, for the lineage."""


class JobConfig(Block):
    """What every kind of job has."""

    api_version: Literal["kubetune.dev/v1alpha1"] = "kubetune.dev/v1alpha1"
    """Version of the API whose words these are."""
    kind: str
    """Kind of the job."""
    run: Run
    """Which run this is."""
    model: Model
    """The model to start from."""
    storage: Storage = Storage()
    """Where URIs lead when they say nothing themselves."""
    workspace: Workspace
    """The durable place of runs and caches."""

    @property
    def other_models(self) -> dict[str, Model]:
        """The models that the job uses beside its own, by field."""
        return {}

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that the job is told, but not of where it runs."""
        told = self.model_dump(mode="json", exclude={"run"})
        return fingerprint(told)

    @property
    def title(self) -> str:
        """How messages name the run: kind, namespace and name."""
        return f"{self.kind} {self.run.namespace}/{self.run.name}"
