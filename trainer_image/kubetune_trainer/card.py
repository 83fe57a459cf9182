"""The card of a model that training leaves behind: README.md, as the Hugging Face Hub shows it beside the files.

Its YAML head says what the Hub asks for (base model, library, tags, datasets, and the license of the base's own card);
its text tells the data, the settings, what was measured, and where all of it came from, with digests. The card tells
about the model and is no part of it: the folder's digest is the same with and without.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.config.recipes import BLOCKS
from kubetune_trainer.export.store import StoredOutput
from kubetune_trainer.lineage import Lineage
from kubetune_trainer.names import CARD_FILE
from kubetune_trainer.storage import open_store

LIBRARIES: Final = {"HuggingFace": "transformers", "PEFT": "peft"}
"""The types of outputs that get a card, and the library that loads each."""
CARRIED: Final = ("license", "license_name", "license_link", "language")
"""What the base's card says and is as true of what was made from it."""
ACCESS: Final = frozenset({"token_secret", "s3"})
TAG: Final = "kubetune"
MEASURES: Final = {
    "step": "Optimizer steps",
    "epoch": "Epochs",
    "loss": "Training loss, last step",
    "validationLoss": "Validation loss, last",
    "bestValidationLoss": "Validation loss, lowest",
    "bestValidationStep": "Step of the lowest, whose weights these are",
    "rewardsAccuracy": "Pairs whose chosen answer has the greater reward, last step",
    "rewardsMargin": "Margin of the rewards, last step",
}
"""What the last report says of how training went, and how the card calls it."""


def write_card(
    output: StoredOutput,
    *,
    config: FineTuneConfig,
    lineage: Lineage,
    base_dir: Path,
    measured: Mapping[str, Any],
    data: Mapping[str, Any],
) -> None:
    """Put a card beside a stored output; a type that has no library of Python's gets none.

    Args:
        output: The output, stored already.
        config: The run.
        lineage: Where the output comes from.
        base_dir: The folder of the model that the run began with; its own card says the license.
        measured: The last step's report.
        data: The statistics of what was trained on.
    """
    if output.type in LIBRARIES:
        card = render_card(
            output, config=config, lineage=lineage, base=read_head(base_dir), measured=measured, data=data
        )
        open_store(output.uri, s3=config.storage.s3).write_bytes(CARD_FILE, card.encode())


def render_card(
    output: StoredOutput,
    *,
    config: FineTuneConfig,
    lineage: Lineage,
    base: Mapping[str, Any],
    measured: Mapping[str, Any],
    data: Mapping[str, Any],
) -> str:
    """Return the text of a card.

    Args:
        output: The output.
        config: The run.
        lineage: Where the output comes from.
        base: The head of the base's own card.
        measured: The last step's report.
        data: The statistics of what was trained on.
    """
    head = yaml.safe_dump(_head(output, config=config, base=base), sort_keys=False, allow_unicode=True)
    began_with = config.model.hub.repo if config.model.hub else lineage["model"]["location"]
    method = config.recipe if config.tuning == "Full" else f"{config.recipe} and {config.tuning}"
    what = "Adapters" if output.type == "PEFT" else "A complete model"
    parts = [
        f"---\n{head}---",
        f"# {config.run.name}",
        f"{what}: `{began_with}`, fine-tuned with {method} by kubetune.",
        "## Data",
        _table(("Source", "From", "Version"), _sources(lineage)),
        _table(("Of an epoch", ""), ((_words(name), value) for name, value in data.items())),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True)}```",
        "## Results",
        _table(("Measure", ""), ((told, measured[name]) for name, told in MEASURES.items() if name in measured)),
        "## Lineage",
        _table(("", ""), _lineage(lineage, output)),
        "`lineage.json` beside this file says the same to programs, with the SHA-256 of each file.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_head(folder: Path) -> dict[str, Any]:
    """Return the YAML head of a folder's card; empty where there is none that can be read."""
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        begin, head, _ = text.split("---\n", 2)
        found = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if not begin.strip("\ufeff \n") and isinstance(found, dict) else {}


def _head(output: StoredOutput, *, config: FineTuneConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads. It refuses a base model or a dataset that is none of its own repositories."""
    base_model = config.model.hub.repo if config.model.hub else None
    if base_model is None and TAG in (base.get("tags") or ()):
        base_model = base.get("base_model")  # one of ours, whose card names the first model
    datasets = sorted({source.hub.repo for source in config.dataset.sources if source.hub})
    method = [] if config.tuning == "Full" else [config.tuning.lower()]
    return {
        **({"base_model": base_model} if base_model else {}),
        "library_name": LIBRARIES[output.type],
        "pipeline_tag": "text-generation",
        "tags": [TAG, config.recipe.lower(), *method],
        **({"datasets": datasets} if datasets else {}),
        **{key: base[key] for key in CARRIED if key in base},
    }


def _settings(config: FineTuneConfig) -> dict[str, Any]:
    """What decided the numbers, but for the model and the sources, which stand in tables of their own."""
    told = config.model_dump(mode="json", exclude_none=True)
    blocks = ("recipe", *BLOCKS.values(), "tuning", "lora", "training")
    of_rows = ("max_sequence_length", "overlong", "packing", "train_on")
    return {
        **{name: _without_access(told[name]) for name in blocks if name in told},
        "dataset": {name: told["dataset"][name] for name in of_rows},
    }


def _without_access(node: Any) -> Any:
    """A block without how a model that it names is reached: Secrets and services are nobody else's business."""
    if not isinstance(node, dict):
        return node
    return {key: _without_access(value) for key, value in node.items() if key not in ACCESS}


def _sources(lineage: Lineage) -> Iterable[Sequence[Any]]:
    for source in lineage["sources"]:
        version = next((source[key] for key in ("commit", "digest", "etag") if source.get(key)), None)
        used = f" ({source['use']})" if source.get("use") else ""
        yield f"{source['name']}{used}", _code(source.get("location")), _code(version)


def _model(name: str, found: Lineage | None) -> Iterable[Sequence[Any]]:
    if found:
        yield name, _code(found["location"])
        yield f"{name}, commit", _code(found.get("commit"))
        yield f"{name}, digest", _code(found["digest"])


def _lineage(lineage: Lineage, output: StoredOutput) -> Iterable[Sequence[Any]]:
    job = f"{lineage['kind']} {lineage['namespace']}/{lineage['name']}"
    yield "Job", f"{job} ({lineage['uid']})"
    yield "Settings", _code(lineage["configDigest"])
    yield "Script", _code(lineage.get("scriptDigest"))
    for name in ("model", "adapter"):
        yield from _model(f"Base {name}", lineage.get(name))
    for other in lineage.get("otherModels") or ():
        yield from _model(f"`{other['field']}`", other)
        yield from _model(f"`{other['field']}, adapter`", other.get("adapter"))
    for parent in lineage["parents"]:
        yield "Made from", f"{parent['kind']} {parent['name']} ({parent['uid']})"
    yield "Image", _code(lineage.get("image"))
    yield "Software, digest", _code(lineage.get("softwareDigest"))
    yield "This model, digest", _code(output.digest)
    yield "Finished", lineage["finishedAt"]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of what is known; empty without a row."""
    known = [row for row in rows if row[-1] is not None or len(row) > 2]
    if not known:
        return ""
    lines = [head, ["---"] * len(head), *(["" if cell is None else _cell(cell) for cell in row] for row in known)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _code(value: str | None) -> str | None:
    return None if value is None else f"`{value}`"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
