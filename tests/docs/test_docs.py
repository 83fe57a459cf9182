"""What the documents say is true of the tree: links lead somewhere, manifests are valid, tables agree with the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from kubetune_operator.api.evaljob import parse_evaljob
from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.quantizejob import parse_quantizejob
from kubetune_operator.cli import app
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.cli.local import check_batch
from kubetune_operator.names import ExitCode
from kubetune_trainer import errors as trainer_errors
from kubetune_trainer.config import load_config
from tests.chart.test_chart import documented_rights, operator_series, trainer_series
from tests.cluster.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("exports/*.md"))]
PARSERS = {"FineTuneJob": parse_finetunejob, "EvalJob": parse_evaljob, "QuantizeJob": parse_quantizejob}
OPERATOR = ROOT / "operator" / "kubetune_operator"


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def table_cells(page: Path, *, after: str) -> Iterator[list[str]]:
    """Rows of the first table after some words."""
    lines = page.read_text().partition(after)[2].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|")) + 2
    for line in lines[begin:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target


def test_every_manifest_is_valid() -> None:
    found = 0
    for block in (block for page in PAGES for block in code_blocks(page, "yaml")):
        if "apiVersion: kubetune.dev" in block:
            for manifest in yaml.safe_load_all(block):
                check_batch(Bundle(job=PARSERS[manifest["kind"]](manifest), manifest=manifest))
                found += 1
    assert found


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    jobs = [each for each in yaml.safe_load_all(path.read_text()) if each and each["kind"] in PARSERS]
    assert jobs
    for job in jobs:
        PARSERS[job["kind"]](job)


def test_the_config_by_hand_is_complete(tmp_path: Path) -> None:
    (block,) = [each for each in code_blocks(DOCS / "training.md", "yaml") if each.startswith("# my.yaml")]
    (tmp_path / "my.yaml").write_text(block)
    assert load_config(tmp_path / "my.yaml").training.max_steps == 100


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    rows = {code: reason for code, reason, *_ in table_cells(DOCS / "training.md", after="## Exit codes")}
    assert {int(code) for code in rows if code.isdigit()} == set(ExitCode) - {ExitCode.CRASHED}
    reasons = {str(int(each.exit_code)): each.reason for each in trainer_error_classes()}
    assert {code: reason for code, reason in rows.items() if code in reasons} == reasons


def trainer_error_classes() -> list[type[trainer_errors.TrainerError]]:
    return trainer_errors.TrainerError.__subclasses__()


NOT_REASONS = {
    # Conditions and states of ours, which are good news or stand for what comes below them.
    "Accepted", "Checkpointed", "CheckpointComplete", "Complete", "DataReady", "Failed", "GatePassed", "GatesPassed",
    "CalibrationIgnored", "ReportNotUnderstood", "Running", "Training", "Workload",
    # Words of Kubernetes that are read and not passed on.
    "BackoffLimitExceeded", "DeletionByTaintManager", "DisruptionTarget", "ErrImageNeverPull", "ErrImagePull",
    "FailedAttachVolume",
    "FailedMapVolume", "FailureTarget", "ImagePullBackOff", "InvalidImageName", "Job", "Normal", "PodScheduled",
    "RegistryUnavailable", "Service", "Succeeded", "SuccessCriteriaMet", "True", "False", "Unknown", "Warning",
    # Words of Kueue.
    "Evicted", "QuotaReserved", "Ready",
}  # fmt: skip


def test_every_reason_of_a_status_is_explained() -> None:
    explained = {
        reason
        for heading in ("## It waits", "## It is complete", "## It has failed", "## It restarts")
        for row in table_cells(DOCS / "troubleshooting.md", after=heading)
        for reason in row[0].split(", ")
    }
    known = {each.reason for each in trainer_error_classes()}
    known |= {word for path in [*OPERATOR.glob("lifecycle/*.py"), OPERATOR / "status.py"] for word in words_of(path)}
    assert known - NOT_REASONS == explained


def words_of(module: Path) -> set[str]:
    """Constants in CamelCase, as reasons are."""
    nodes = ast.walk(ast.parse(module.read_text()))
    texts = {each.value for each in nodes if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return {text for text in texts if re.fullmatch(r"[A-Z][A-Za-z]+", text)}


def test_the_tables_of_metrics_are_those_of_the_code() -> None:
    page = DOCS / "operations.md"
    operator = {row[0].strip("`") for row in table_cells(page, after="The operator's metrics")}
    assert operator == {re.sub(r"_(bucket|count|sum)$", "", name) for name in operator_series()}
    trainer = {
        f"kubetune_trainer_{name.strip('`')}"
        for row in table_cells(page, after="Rank 0 of each job")
        for name in row[0].split(", ")
    }
    assert trainer == trainer_series()


def test_the_table_of_rights_is_that_of_the_code() -> None:
    said = set()
    for resources, verbs in table_cells(DOCS / "operations.md", after="The operator may"):
        for resource in resources.removesuffix(" (kubetune.dev)").split(", "):
            said |= {(resource, verb) for verb in re.findall(r"\w+", verbs.partition("(")[0])}
    elsewhere = {"nodes", "leases"}
    assert said == {
        (f"{resource}{'.batch' if group == 'batch' else ''}", verb)
        for group, resource, verb in documented_rights()
        if resource not in elsewhere
    }


def test_every_value_that_the_documents_name_exists() -> None:
    values = yaml.safe_load((ROOT / "helm" / "kubetune" / "values.yaml").read_text())
    text = "".join((DOCS / name).read_text() for name in ("operations.md", "troubleshooting.md"))
    tops = "|".join(key for key, value in values.items() if isinstance(value, dict))
    named = set(re.findall(rf"`((?:{tops})\.[\w.]+)(?::[^`]*)?`", text))
    assert len(named) > 10
    for path in named:
        assert has_path(values, path.split(".")), path


def has_path(values: Any, path: list[str]) -> bool:
    return not path or (isinstance(values, dict) and path[0] in values and has_path(values[path[0]], path[1:]))


def test_every_command_of_kubetune_exists() -> None:
    known = typer.main.get_command(app).commands
    named = {word for page in PAGES for word in re.findall(r"(?:\$ |`)kubetune ([a-z]+)", page.read_text())}
    assert named
    assert named <= set(known)


def test_no_output_that_is_shown_is_empty() -> None:
    shown = [block for page in PAGES for block in code_blocks(page, "console")]
    assert shown
    for block in shown:
        first, _, output = block.partition("\n")
        assert output.strip() or not first.startswith(("$ kubectl get", "$ kubectl describe")), first


def test_the_page_shows_the_example_of_a_script_as_it_is() -> None:
    (shown,) = [each for each in code_blocks(DOCS / "training.md", "python") if each.startswith("def focal_loss")]
    objects = yaml.safe_load_all((ROOT / "examples" / "custom.yaml").read_text())
    (script,) = [each["data"]["focal.py"] for each in objects if each["metadata"]["name"] == "focal" and "data" in each]
    assert shown in script
    (block,) = [each for each in code_blocks(DOCS / "training.md", "yaml") if "recipe: Custom" in each]
    example = next(yaml.safe_load_all((ROOT / "examples" / "custom.yaml").read_text()))["spec"]
    assert yaml.safe_load(block)["spec"] == {name: example[name] for name in ("recipe", "custom")}


def test_the_status_of_a_job_without_its_secret_was_taken_when_it_said_so() -> None:
    text = (ROOT / "docs" / "status.md").read_text()
    section = text.partition("## Pending: a Secret is missing")[2].partition("\n## ")[0]
    assert 'secret "absent" not found' in section
    assert "SecretMissing" in section
