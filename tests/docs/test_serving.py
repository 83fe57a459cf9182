"""Manifests that serve our outputs are whole, and ask for files that the exports write."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_trainer.export.gguf import GGUF_FILE
from tests.cluster.paths import ROOT

MANIFESTS = sorted((ROOT / "examples" / "serving").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def test_each_engine_has_one() -> None:
    assert {path.stem for path in MANIFESTS} == {"kserve", "llama-cpp", "vllm"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_names_its_output_and_says_that_it_was_not_run(path: Path) -> None:
    text = path.read_text()
    assert "Not run by our tests" in text
    assert "/outputs/" in text
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata", "spec"} <= document.keys()


@pytest.mark.parametrize("name", ["llama-cpp", "vllm"])
def test_volumes_labels_and_ports_lead_somewhere(name: str) -> None:
    deployment, service = documents(ROOT / "examples" / "serving" / f"{name}.yaml")
    template = deployment["spec"]["template"]
    pod = template["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert (
        template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    )
    ports = {port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_llama_cpp_is_pointed_at_the_file_that_the_export_writes() -> None:
    deployment, _ = documents(ROOT / "examples" / "serving" / "llama-cpp.yaml")
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--model") + 1] == f"/model/{GGUF_FILE}"
