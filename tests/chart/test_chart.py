"""What the chart renders, value by value."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from kubetune_operator import metrics as operator_metrics
from kubetune_operator.settings import PREFIX, Settings, load_settings
from kubetune_trainer import report as trainer_report
from tests.chart.rendering import CHART, EVERYTHING, GOLDEN, MODES, NAMESPACED, Rendered, run_helm
from tests.cluster.paths import ROOT

Render = Callable[..., Rendered]
all_modes = pytest.mark.parametrize("values", MODES.values(), ids=MODES)


def test_helm_lint_finds_nothing() -> None:
    run_helm("lint", "--strict", str(CHART))


@pytest.mark.parametrize("mode", MODES)
def test_the_rendered_manifests_are_the_golden_ones(mode: str, render: Render) -> None:
    # A change that is wanted: `python -m tests.chart.rendering` writes them anew.
    golden = list(yaml.safe_load_all((GOLDEN / f"{mode}.yaml").read_text()))
    rendered = render(MODES[mode]).own()
    assert [name_of(each) for each in rendered] == [name_of(each) for each in golden]
    for found, wanted in zip(rendered, golden, strict=True):
        assert found == wanted, name_of(wanted)


def name_of(manifest: dict[str, Any]) -> str:
    metadata = manifest["metadata"]
    return f"{manifest['kind']} {metadata.get('namespace', '')}/{metadata['name']}"


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replicaCount": 2}, "additional properties 'replicaCount' not allowed"),
        ({"trainer": {"gpu": True}}, "additional properties 'gpu' not allowed"),
        ({"replicas": "two"}, "at '/replicas': got string, want integer"),
        ({"trainer": {"cpuProcesses": -1}}, "at '/trainer/cpuProcesses': minimum: got -1, want 0"),
        ({"image": {"digest": "sha256:12"}}, "at '/image/digest': 'sha256:12' does not match pattern"),
        ({"image": {"repository": "registry/operator:1.0"}}, "at '/image/repository'"),
        ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy'"),
        ({"settings": {"logLevel": "chatty"}}, "at '/settings/logLevel'"),
        ({"namespaces": "team-a"}, "at '/namespaces': got string, want array"),
        ({"namespaces": ["Team_A"]}, "at '/namespaces/0': 'Team_A' does not match pattern"),
        ({"networkPolicy": {"apiServerPorts": [70000]}}, "at '/networkPolicy/apiServerPorts/0'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(values: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    ran = run_helm("template", str(CHART), f"--values={tmp_path / 'values.yaml'}", check=False)
    assert ran.returncode
    assert complaint in ran.stderr


def test_every_value_is_in_the_schema_and_every_name_of_the_schema_has_a_value() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(paths_of_schema(schema, schema)) - {"global"} == set(paths_of_values(values, schema, schema))


def paths_of_schema(node: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    for name, each in resolved(node, root).get("properties", {}).items():
        yield name
        if is_closed(each, root):
            yield from (f"{name}.{below}" for below in paths_of_schema(each, root))


def paths_of_values(values: dict[str, Any], node: dict[str, Any], root: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield name
        below = resolved(node, root)["properties"].get(name, {})
        if is_closed(below, root):
            yield from (f"{name}.{path}" for path in paths_of_values(value, below, root))


def is_closed(node: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether the chart decides which names there are; those of resources are Kubernetes' own."""
    found = resolved(node, root)
    return found.get("additionalProperties") is False and "claims" not in found.get("properties", {})


def resolved(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return root["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def test_every_value_has_a_comment_of_its_own() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *\w+: *[^ #]", line) and not before.lstrip().startswith("#") and not in_resources(line)
    ]
    assert not bare


def in_resources(line: str) -> bool:
    return line.strip().split(":")[0] in {"cpu", "memory"} and line.startswith("    ")


@pytest.mark.parametrize("kind", ["serviceMonitor", "podMonitor", "prometheusRule"])
def test_a_monitor_without_the_prometheus_operator_is_refused(kind: str) -> None:
    ran = run_helm("template", str(CHART), f"--set=monitoring.{kind}.enabled=true", check=False)
    assert ran.returncode
    assert f"monitoring.{kind}.enabled=true needs the Prometheus operator" in ran.stderr


# --------------------------------------------------------------------------------------------------- settings


@all_modes
def test_the_operator_understands_the_environment_that_the_chart_gives_it(
    values: dict[str, Any], render: Render
) -> None:
    settings = load_settings(render(values).environment())
    assert settings.namespaces == tuple(values.get("namespaces", ()))


def test_every_setting_of_the_operator_follows_from_a_value(render: Render) -> None:
    given = {name.removeprefix(PREFIX).lower() for name in render(EVERYTHING | NAMESPACED).environment()}
    # The identity is the pod's own; the ports are fixed by the chart.
    assert given == set(Settings.model_fields) - {"identity", "metrics_port", "health_port"}


def test_the_defaults_of_the_chart_are_the_defaults_of_the_operator(render: Render) -> None:
    settings, defaults = load_settings(render().environment()), Settings()
    differ = {name for name in Settings.model_fields if getattr(settings, name) != getattr(defaults, name)}
    assert differ <= {"identity", "namespace", "lease_name"}


def test_values_reach_the_operator(render: Render) -> None:
    settings = load_settings(render(EVERYTHING).environment())
    assert settings.trainer_image == f"registry.example/kubetune-trainer:1.0@sha256:{'b' * 64}"
    assert settings.memory_per_device_bytes == 85_899_345_920
    assert settings.cpu_processes == 2
    assert settings.progress_interval_seconds == 0.5
    assert settings.image_pull_secrets == ("registry",)


def test_ports_and_probes_are_those_of_the_operator(render: Render) -> None:
    (container,) = render().one("Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"metrics": Settings().metrics_port, "health": Settings().health_port}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}


# ----------------------------------------------------------------------------------------------------- rights


@all_modes
def test_no_role_grants_secrets_or_wildcards(values: dict[str, Any], render: Render) -> None:
    roles = render(values).roles()
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert not {"secrets", "*"} & {*rule["resources"], *rule["verbs"], *rule["apiGroups"]}, name_of(role)


def test_namespaced_mode_has_no_cluster_wide_right(render: Render) -> None:
    rendered = render(NAMESPACED)
    assert not rendered.of("ClusterRole")
    assert not rendered.of("ClusterRoleBinding")
    assert not [each for each in rendered.objects if "namespace" not in each["metadata"]]
    namespaces = {each["metadata"]["namespace"] for each in rendered.of("Role")}
    assert namespaces == {"team-a", "team-b", "kubetune-system"}


def test_the_rights_are_those_that_the_operator_documents(render: Render) -> None:
    rendered = render()
    (role,) = [each for each in rendered.of("ClusterRole") if each["metadata"]["name"] == "kubetune"]
    lease = rendered.one("Role")
    assert granted([*role["rules"], *lease["rules"]]) == documented_rights()


def test_kueue_takes_two_rights_more(render: Render) -> None:
    rendered = render({"kueue": {"enabled": True}})
    (role,) = [each for each in rendered.of("ClusterRole") if each["metadata"]["name"] == "kubetune"]
    assert granted([*role["rules"], *rendered.one("Role")["rules"]]) == documented_rights(kueue=True)
    assert load_settings(rendered.environment()).kueue


def granted(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def documented_rights(*, kueue: bool = False) -> set[tuple[str, str, str]]:
    """The tables in the docstring of the module that talks to the API server; those for Kueue only where it is used."""
    text = (ROOT / "operator" / "kubetune_operator" / "cluster.py").read_text().split('"""')[1]
    tables = [table for table in re.split(r"\n(?=In |Where )", text) if kueue or "Kueue" not in table]
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([\w, ]+) \|$", "\n".join(tables), re.MULTILINE)
    found = [row for row in rows if row[0] != "group"]
    assert found
    return {(group.strip('"'), resource, verb) for group, resource, verbs in found for verb in verbs.split(", ")}


def test_nodes_are_not_readable_when_that_is_switched_off(render: Render) -> None:
    roles = render({"rbac": {"readNodes": False}}).roles()
    assert not [rule for role in roles for rule in role["rules"] if "nodes" in rule["resources"]]


def test_every_role_is_bound_or_aggregated(render: Render) -> None:
    rendered = render()
    bound = {each["roleRef"]["name"] for each in rendered.of("RoleBinding") + rendered.of("ClusterRoleBinding")}
    loose = [each for each in rendered.roles() if each["metadata"]["name"] not in bound]
    assert {each["metadata"]["name"] for each in loose} == {"kubetune-edit", "kubetune-view"}
    for role in loose:
        assert [key for key in role["metadata"]["labels"] if "/aggregate-to-" in key], name_of(role)


# ------------------------------------------------------------------------------------------------------- pods


@all_modes
def test_every_pod_keeps_the_restricted_pod_security_standard(values: dict[str, Any], render: Render) -> None:
    pods = render(values).pod_specs()
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert all(set(volume) <= {"name", "emptyDir"} for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]


def test_a_digest_decides_which_image_runs(render: Render) -> None:
    images = {pod["containers"][0]["image"] for pod in render(EVERYTHING).pod_specs()}
    assert images == {f"localhost/kubetune-operator:dev@sha256:{'a' * 64}"}


def test_selectors_match_the_operator_and_not_the_test(render: Render) -> None:
    rendered = render(EVERYTHING)
    selector = rendered.one("Service")["spec"]["selector"].items()
    template = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert selector <= template
    assert not selector <= rendered.one("Pod")["metadata"]["labels"].items()


def test_no_replica_is_protected_alone(render: Render) -> None:
    assert not render().of("PodDisruptionBudget")
    assert render(EVERYTHING).one("PodDisruptionBudget")["spec"]["minAvailable"] == 1


# ------------------------------------------------------------------------------------------------------- CRDs


def test_the_crds_of_the_chart_are_the_generated_ones(render: Render) -> None:
    rendered = render({"crds": {"keep": False}}).of("CustomResourceDefinition")
    generated = [yaml.safe_load(path.read_text()) for path in (ROOT / "crds").glob("*.yaml")]
    assert sorted(rendered, key=name_of) == sorted(generated, key=name_of)


def test_crds_outlive_the_release_unless_told_otherwise(render: Render) -> None:
    crds = render().of("CustomResourceDefinition")
    assert [each["metadata"]["annotations"] for each in crds] == [{"helm.sh/resource-policy": "keep"}] * 3


def test_crds_can_be_left_to_somebody_else(render: Render) -> None:
    assert not render({"crds": {"enabled": False}}).of("CustomResourceDefinition")


# ------------------------------------------------------------------------------------------------- monitoring


def test_alerts_and_dashboard_ask_only_for_metrics_that_exist(render: Render) -> None:
    rendered = render(EVERYTHING)
    rules = [rule for group in rendered.one("PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    dashboard = json.loads(rendered.one("ConfigMap")["data"]["kubetune.json"])
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"\bkubetune_\w+", expression)}
    assert len(asked) > 10
    assert asked <= operator_series() | trainer_series()


def test_the_dashboard_is_shipped_as_it_is(render: Render) -> None:
    shipped = render(EVERYTHING).one("ConfigMap")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(shipped["data"]["kubetune.json"]) == json.loads((CHART / "files" / "dashboard.json").read_text())


def operator_series() -> set[str]:
    collectors = [
        each
        for each in vars(operator_metrics).values()
        if isinstance(each, prometheus_client.Counter | prometheus_client.Gauge | prometheus_client.Histogram)
    ]
    names = set()
    for metric in (metric for each in collectors for metric in each.describe()):
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(metric.type, [""])
        names |= {metric.name + ending for ending in endings}
    return names


def trainer_series() -> set[str]:
    gauges = [name for fields in trainer_report._GAUGES.values() for name, _ in fields.values()]
    counters = [f"{name}_total" for name, _ in trainer_report._COUNTERS.values()]
    return {f"kubetune_trainer_{name}" for name in gauges + counters}


def test_the_trainer_monitor_follows_the_served_namespaces(render: Render) -> None:
    assert render(EVERYTHING).one("PodMonitor")["spec"]["namespaceSelector"] == {"any": True}
    namespaced = render(EVERYTHING | NAMESPACED).one("PodMonitor")["spec"]["namespaceSelector"]
    assert namespaced == {"matchNames": ["team-a", "team-b"]}
