"""Data: where samples come from and how they become rows of tokens."""

from typing import Annotated, Final, Literal

from pydantic import Field

from kubetune_operator.api.common import (
    S3,
    ConfigMapKeyRef,
    DnsLabel,
    Fraction,
    PositiveNumber,
    SecretKeyRef,
    Uri,
    matches,
)
from kubetune_operator.api.model import ApiModel, Unique, exactly_one_of

JUDGED: Final = ("Preference", "UnpairedPreference")
"""Formats of answers of which it is known how good they are."""

ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class HubDataset(ApiModel):
    """A dataset on the Hugging Face Hub."""

    repo: Annotated[
        str,
        Field(min_length=1, max_length=193),
        matches(
            r"([-_.a-zA-Z0-9]+/)?[-_.a-zA-Z0-9]+",
            message="must be a repository of the Hub, for example tatsu-lab/alpaca",
        ),
    ]
    """Repository, for example tatsu-lab/alpaca."""
    config: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Configuration (subset) of the dataset. Unset: its default."""
    split: Annotated[
        str,
        Field(min_length=1, max_length=128),
        matches(
            r"[-._a-zA-Z0-9]+(\[(-?[0-9]+%?)?:(-?[0-9]+%?)?\])?",
            message="must be a name with an optional slice, for example train[:95%]",
        ),
    ] = "train"
    """Split, or part of one as in train[:95%]."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] = "main"
    """Branch, tag or commit. It is resolved to a commit once, when the job starts."""
    token_secret: SecretKeyRef | None = None
    """Access token for private or gated datasets. Unset: anonymous."""


class UriDataset(ApiModel):
    """Data files (json, jsonl, csv, each also as .gz, or parquet) in storage."""

    location: Uri
    """A file, or a folder of files: s3://bucket/path, pvc://claim/path or, for local runs, file:///path."""
    s3: S3 | None = None
    """Access to this location where it differs from spec.storage.s3."""


class Columns(ApiModel):
    """Which column of the data holds which field of its format, where the names differ."""

    instruction: ColumnName | None = None
    """Column of an Alpaca sample's instruction."""
    input: ColumnName | None = None
    """Column of an Alpaca sample's input."""
    output: ColumnName | None = None
    """Column of an Alpaca sample's output."""
    system: ColumnName | None = None
    """Column of the system message."""
    messages: ColumnName | None = None
    """Column of the list of messages."""
    conversations: ColumnName | None = None
    """Column of a ShareGPT sample's list of turns."""
    tools: ColumnName | None = None
    """Column of the tools that the assistant may call."""
    prompt: ColumnName | None = None
    """Column of the prompt."""
    completion: ColumnName | None = None
    """Column of the completion."""
    chosen: ColumnName | None = None
    """Column of the better answer of a pair."""
    rejected: ColumnName | None = None
    """Column of the other answer."""
    label: ColumnName | None = None
    """Column that says whether a completion is a good one."""
    text: ColumnName | None = None
    """Column of the running text."""


class Source(ApiModel):
    """One source of samples: exactly one of hub, uri, configMap."""

    rules = (exactly_one_of("hub", "uri", "configMap"),)

    name: DnsLabel
    """Name of the source, unique among the sources."""
    hub: HubDataset | None = None
    """A dataset on the Hugging Face Hub."""
    uri: UriDataset | None = None
    """Data files in storage."""
    config_map: ConfigMapKeyRef | None = None
    """A jsonl file in a ConfigMap, for small data."""
    format: Literal[
        "Auto", "Alpaca", "ShareGPT", "Messages", "PromptCompletion", "Text", "Preference", "UnpairedPreference"
    ] = "Auto"  # fmt: skip
    """What a record looks like. Auto: told from its columns."""
    columns: Columns | None = None
    """Names of the columns where they differ from the format's own."""
    weight: PositiveNumber = "1.0"
    """How often the source appears per epoch: 2.0 is twice, 0.5 is half of it."""


Sources = Annotated[list[Source], Field(min_length=1, max_length=32), Unique(("name",))]


class Validation(ApiModel):
    """Data for the validation loss: exactly one of fraction, sources."""

    rules = (exactly_one_of("fraction", "sources"),)

    fraction: Fraction | None = None
    """Part of the samples that is held out of training, for example "0.05"."""
    sources: Sources | None = None
    """Sources of their own."""


class Samples(ApiModel):
    """Data and how it becomes rows of tokens."""

    sources: Sources
    """Where the samples come from."""
    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    """Chat template (Jinja). Unset: the model's own."""
    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Most tokens in a row."""
    overlong: Literal["Truncate", "Split", "Drop", "Fail"] = "Truncate"
    """What happens to a sample that is longer than that."""
    packing: Literal["BestFit", "None"] | None = None
    """BestFit fills each row with several samples that do not see each other; None keeps one sample in a row.
    Unset: BestFit, but None where a sample is a pair of answers."""
    train_on: Literal["Assistant", "LastAssistant", "All"] = "Assistant"
    """Which part of a conversation the loss counts."""


class Dataset(Samples):
    """The data to train on and how it becomes rows of tokens."""

    validation: Validation | None = None
    """Data for the validation loss. Unset: none is computed."""
