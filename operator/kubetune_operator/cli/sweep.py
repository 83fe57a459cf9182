"""`kubetune sweep`: one manifest and several values of some fields make a job for every combination of them."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import yaml

from kubetune_operator.api.common import NAME_LENGTH
from kubetune_operator.api.finetunejob import FineTuneJob, batch_problem, parse_finetunejob
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.errors import SpecError
from kubetune_operator.names import ANNOTATION_SWEEP_DIGEST, ANNOTATION_SWEEP_VALUES, LABEL_SWEEP

Json = dict[str, Any]

MOST_JOBS: Final = 256
"""More combinations than this are taken for a slip of the pen."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job of a sweep.

    Attributes:
        job: The job, checked.
        manifest: The same as it is created.
        values: The values that make it differ from the others, by field.
    """

    job: FineTuneJob
    manifest: Json
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.job.metadata.name


def plan(bundle: Bundle, *, settings: Sequence[str]) -> list[Run]:
    """Make the jobs of a sweep, all of them checked.

    Args:
        bundle: The manifest file.
        settings: What stood after each `--set`: `training.learningRate=1e-4,2e-4`.

    Raises:
        SpecError: A setting or a job that it makes breaks rules.
    """
    if not isinstance(bundle.job, FineTuneJob):
        raise SpecError(bundle.title, problems=["is no FineTuneJob, and only these are swept"])
    choices: dict[str, list[Any]] = {}
    for setting in settings:
        path, texts = parse_setting(setting)
        if path in choices:
            raise SpecError("kubetune sweep", problems=[f"--set {path} stands twice"])
        choices[path] = [_typed(bundle.manifest, path, text) for text in texts]
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    if len(combinations) > MOST_JOBS:
        raise SpecError(
            "kubetune sweep", problems=[f"these are {len(combinations)} jobs; at most {MOST_JOBS} are made"]
        )
    base, last = bundle.job.metadata.name, str(len(combinations))
    if len(base) + 1 + len(last) > NAME_LENGTH:
        room = NAME_LENGTH - 1 - len(last)
        raise SpecError(bundle.title, problems=[f"metadata.name must have at most {room} characters in this sweep"])
    return [_run(bundle, number=number, values=values) for number, values in enumerate(combinations, start=1)]


def parse_setting(setting: str) -> tuple[str, list[str]]:
    """Split `training.learningRate=1e-4,2e-4` into the field and its values; `[a,b]` is one value.

    Raises:
        SpecError: It does not look like that.
    """
    path, equals, rest = setting.partition("=")
    path = path.strip().removeprefix("spec.")
    texts = list(_split(rest))
    if not equals or not path or not all(texts) or len(set(texts)) < len(texts):
        problem = f"--set {setting}: must be FIELD=VALUE,VALUE,… with values that differ"
        raise SpecError("kubetune sweep", problems=[problem])
    return path, texts


def _split(text: str) -> Iterator[str]:
    """Parts between commas that stand in no brackets."""
    part, depth = "", 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            yield part.strip()
            part = ""
        else:
            part += letter
    yield part.strip()


def _typed(manifest: Json, path: str, text: str) -> Any:
    """A value as its field wants it: most numbers of the API stand in strings, integers do not.

    Raises:
        SpecError: It is wrong either way; told is what is wrong with it as YAML.
    """
    try:
        literal = yaml.safe_load(text)
    except yaml.YAMLError:
        literal = text  # no YAML: the words themselves, of which the field says what is wrong
    for value in dict.fromkeys((text, literal)) if isinstance(literal, int | float) else (literal,):
        try:
            parse_finetunejob(_with(manifest, {path: value}))
        except SpecError as error:
            problem = error
        else:
            return value
    raise problem


def _with(manifest: Json, values: Mapping[str, Any]) -> Json:
    """The manifest with other values of some fields of its spec; blocks on the way are made.

    Raises:
        SpecError: On the way to a field is something that has no fields.
    """
    changed = deepcopy(manifest)
    for path, value in values.items():
        block = changed["spec"]
        *way, name = path.split(".")
        for step in way:
            if not isinstance(block, dict):
                break
            if block.get(step) is None:
                block[step] = {}
            block = block[step]
        if not isinstance(block, dict):
            raise SpecError("kubetune sweep", problems=[f"--set {path}: spec.{path} is no field of a block"])
        block[name] = value
    return changed


def _run(bundle: Bundle, *, number: int, values: Mapping[str, Any]) -> Run:
    manifest = _with(bundle.manifest, values)
    base = bundle.job.metadata.name
    metadata = manifest["metadata"]
    metadata["name"] = f"{base}-{number}"
    metadata["labels"] = (metadata.get("labels") or {}) | {LABEL_SWEEP: base}
    for output in manifest["spec"]["outputs"]:
        if output.get("uri"):  # jobs must not write over each other's results
            output["uri"] = f"{output['uri'].rstrip('/')}/{metadata['name']}"
    if manifest["spec"].get("pushToHub"):
        manifest["spec"]["pushToHub"]["repo"] += f"-{number}"
    metadata["annotations"] = (metadata.get("annotations") or {}) | {
        ANNOTATION_SWEEP_VALUES: json.dumps(values),
        ANNOTATION_SWEEP_DIGEST: _digest(manifest["spec"]),
    }
    job = parse_finetunejob(manifest)
    if problem := batch_problem(job.spec, ranks=job.spec.ranks):
        raise SpecError(f"{bundle.title} with {told(values)}", problems=[problem])
    return Run(job=job, manifest=manifest, values=values)


def _digest(spec: Json) -> str:
    """Tells a job from one of the same name and values of a manifest that was changed since."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def told(values: Mapping[str, Any]) -> str:
    """Values as people read them."""
    return ", ".join(f"{path}={value}" for path, value in values.items())
