"""Run Helm on the chart and look into what it renders.

python -m tests.chart.rendering     # writes golden/ anew, after a change of the chart that is wanted
"""

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.binaries import binary
from tests.cluster.paths import ROOT

CHART = ROOT / "helm" / "kubetune"
GOLDEN = Path(__file__).parent / "golden"
MONITORS = ("ServiceMonitor", "PodMonitor", "PrometheusRule")

EVERYTHING: dict[str, Any] = {
    "commonLabels": {"team": "ml"},
    "image": {"digest": f"sha256:{'a' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "trainer": {
        "image": {"repository": "registry.example/kubetune-trainer", "tag": "1.0", "digest": f"sha256:{'b' * 64}"},
        "cpuProcesses": 2,
        "memoryPerDeviceBytes": 85_899_345_920,
        "prepare": {"cpu": "2", "memory": "8Gi"},
    },
    "kueue": {"enabled": True},
    "settings": {"logLevel": "DEBUG", "progressIntervalSeconds": 0.5, "apiQps": 20},
    "replicas": 2,
    "serviceAccount": {"annotations": {"example.com/role": "kubetune"}},
    "podLabels": {"tier": "control"},
    "podAnnotations": {"example.com/note": "yes"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "system-cluster-critical",
    "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}], "apiServerPorts": [443]},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "15s"},
        "podMonitor": {"enabled": True, "interval": "15s"},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
}
NAMESPACED: dict[str, Any] = {"namespaces": ["team-a", "team-b"], "crds": {"enabled": False}}
MODES: dict[str, dict[str, Any]] = {"cluster": {}, "namespaced": NAMESPACED, "everything": EVERYTHING}


class Rendered:
    """The objects that the chart renders.

    Attributes:
        text: As Helm printed them.
        objects: Parsed, in the same order.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[dict[str, Any]] = [each for each in yaml.load_all(text, Loader=_Strict) if each]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Objects of a kind."""
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        """The only object of a kind."""
        (found,) = self.of(kind)
        return found

    def roles(self) -> list[dict[str, Any]]:
        """Roles and ClusterRoles."""
        return self.of("Role") + self.of("ClusterRole")

    def environment(self) -> dict[str, str]:
        """The operator's environment; a value that comes from the pod's own fields is written as the field's path."""
        (container,) = self.one("Deployment")["spec"]["template"]["spec"]["containers"]
        return {each["name"]: each.get("value") or field_path(each) for each in container["env"]}

    def pod_specs(self) -> list[dict[str, Any]]:
        """The specs of all pods, those of hooks included."""
        deployed = [each["spec"]["template"]["spec"] for each in self.of("Deployment")]
        return deployed + [each["spec"] for each in self.of("Pod")]

    def own(self) -> list[dict[str, Any]]:
        """All objects but those that carry a file of the tree: the custom resource definitions and the dashboard."""
        return [each for each in self.objects if each["kind"] not in {"CustomResourceDefinition", "ConfigMap"}]


class _Strict(yaml.CSafeLoader):
    """Refuses a key that stands twice, as the API server does."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{node.start_mark}: stands twice: {', '.join(map(str, twice))}")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def field_path(variable: dict[str, Any]) -> str:
    """Where a variable of the downward API comes from."""
    return str(variable["valueFrom"]["fieldRef"]["fieldPath"])


def run_helm(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Helm."""
    ran = subprocess.run([str(binary("helm")), *arguments], check=False, capture_output=True, text=True)
    if check and ran.returncode:
        raise AssertionError(f"helm {' '.join(arguments)}:\n{ran.stderr}")
    return ran


def render_chart(values: Mapping[str, Any], *, namespace: str = "kubetune-system") -> Rendered:
    """Render the chart as release `kubetune`, for a cluster that has the Prometheus operator."""
    apis = [f"--api-versions=monitoring.coreos.com/v1/{kind}" for kind in MONITORS]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(values), file)
        file.flush()
        arguments = ["kubetune", str(CHART), f"--namespace={namespace}", f"--values={file.name}"]
        return Rendered(run_helm("template", *arguments, *apis).stdout)


class _Readable(yaml.SafeDumper):
    """Writes text of several lines as it is."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


if __name__ == "__main__":
    for mode, mode_values in MODES.items():
        objects = render_chart(mode_values).own()
        golden = yaml.dump_all(objects, Dumper=_Readable, sort_keys=False, width=160)
        (GOLDEN / f"{mode}.yaml").write_text(golden)
