"""Repositories of the Hugging Face Hub: what a branch or tag stands for now, which files are there, and the files.

Everything is fixed to a commit before it is downloaded. HF_ENDPOINT names another Hub, and HF_TOKEN is the token where
the config names no Secret.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils._http import default_client_factory

from kubetune_trainer.errors import ConfigError, DataError, StorageError
from kubetune_trainer.storage import read_secret

if TYPE_CHECKING:
    from kubetune_trainer.config import HubModel, SecretKey

RepoType = Literal["model", "dataset"]
PAUSES_SECONDS: Final = (1.0, 4.0, 15.0)
"""Between the tries of one request; after the last the Hub counts as unavailable."""
SILENCE_SECONDS: Final = 60.0
"""How long one connection may stay without a word; a file may take as long as it takes."""
REFUSALS: Final = frozenset({400, 401, 403, 422})
"""Statuses that another try would only repeat."""
UNREACHABLE: Final = (errors.HTTPError, ConnectionError, TimeoutError)
"""What is raised where the network fails; the builtin ones are those of hf_xet, which brings large files."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class HubRepo:
    """A repository at one commit."""

    repo: str
    """Owner and name."""
    kind: RepoType
    """Model or dataset."""
    commit: str
    """The commit, in full."""
    paths: tuple[str, ...]
    """All of its files."""
    card: dict[str, Any]
    """What its README says in its YAML head."""
    token: str | None
    """Opens private and gated repositories."""

    def download(self, path: str, folder: Path) -> Path:
        """Returns the local copy of a file, below `folder` under its own path.

        Raises:
            StorageError: The Hub does not answer.
            DataError: There is no such file.
        """

        def attempt() -> str:
            return huggingface_hub.hf_hub_download(
                self.repo,
                path,
                repo_type=self.kind,
                revision=self.commit,
                local_dir=folder,
                token=self.token or False,
                endpoint=endpoint(),
            )

        return Path(ask_hub(attempt, what=f"{self.kind} {self.repo} on the Hub: {path}"))


def find_repo(source: "HubModel", *, kind: RepoType) -> HubRepo:
    """Returns a repository with its revision fixed to a commit.

    Raises:
        ConfigError: There is no such repository or revision, or the token does not open it.
        StorageError: The Hub does not answer.
    """
    token = token_of(source.token_secret)
    api = huggingface_hub.HfApi(endpoint=endpoint(), token=token or False)
    found = ask_hub(
        lambda: api.repo_info(source.repo, revision=source.revision, repo_type=kind),
        what=f"{kind} {source.repo} at revision {source.revision} on the Hub",
    )
    return HubRepo(
        repo=source.repo,
        kind=kind,
        commit=found.sha,
        paths=tuple(sorted(file.rfilename for file in found.siblings or ())),
        card=found.card_data.to_dict() if found.card_data else {},
        token=token,
    )


def token_of(secret: "SecretKey | None") -> str | None:
    """Returns the token of a Secret, otherwise that of the environment."""
    return (read_secret(secret) if secret else None) or os.environ.get("HF_TOKEN") or None


def endpoint() -> str | None:
    """Returns the Hub's URL where it is not the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def ask_hub(request: Callable[[], Result], *, what: str) -> Result:
    """Returns what a request to the Hub returns, after a few tries.

    Args:
        request: Asks by huggingface_hub.
        what: How messages begin.

    Raises:
        ConfigError: The Hub refuses, or has no such thing.
        DataError: There is no such file.
        StorageError: The Hub does not answer.
    """
    for pause in PAUSES_SECONDS:
        try:
            with _translated(what):
                return request()
        except StorageError:
            time.sleep(pause)
    with _translated(what):
        return request()


def _client() -> Any:
    client = default_client_factory()
    client.event_hooks["request"].append(_bound)
    return client


def _bound(request: Any) -> None:
    # huggingface_hub's client waits for ever, and some of its calls ask for that themselves: a Hub that takes a
    # connection and says nothing would hold the job until its deadline. Each connect, read and write is bounded here.
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        phase: SILENCE_SECONDS if given.get(phase) is None else given[phase]
        for phase in ("connect", "read", "write", "pool")
    }


huggingface_hub.set_client_factory(_client)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Says in our errors whose turn it is."""
    access = "Check the name, and that the token (tokenSecret or HF_TOKEN) belongs to somebody who has access."
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(f"{what}: the repository is gated and this token does not open it", hint=access) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(f"{what}: there is no such repository, or this token may not see it", hint=access) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{what}: there is no such branch, tag or commit") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{what}: {error}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise DataError(f"{what}: there is no such file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in REFUSALS:
            said = f": {error.server_message}" if error.server_message else ""
            raise ConfigError(f"{what}: the Hub refused with status {status}{said}", hint=access) from error
        raise StorageError(f"{what}: the Hub answered with status {status}") from error
    except (*UNREACHABLE, errors.LocalEntryNotFoundError) as error:
        hint = "The model and the data may also lie in storage: model.uri, dataset.sources[].uri."
        raise StorageError(f"{what}: the Hub cannot be reached: {error}", hint=hint) from error
