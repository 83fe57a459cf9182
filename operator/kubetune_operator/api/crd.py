"""Write the CRDs, the chart's copy of them and their reference from the models; `--check` compares instead.

    python -m kubetune_operator.api.crd [--check]

Structural schemas know no references, no null type and no unions, so pydantic's schema is folded into one tree here.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from kubetune_operator.api.kinds import MODELS
from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.api.model import ApiModel
from kubetune_operator.api.reference import reference_of
from kubetune_operator.names import API_GROUP, API_VERSION, KINDS

JsonSchema = dict[str, Any]

ROOT = Path(__file__).resolve().parents[3]
HEADER = "# Generated from the models in kubetune_operator.api by `make generate`. Do not edit.\n"
KEEP = """\
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""
_DROPPED = {"title", "$defs", "const", "additionalProperties", "anyOf", "properties", "items", "readOnly"}


def crd_of(kind: str) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    models, names = MODELS[kind], KINDS[kind]
    version = {
        "name": API_VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": value, "jsonPath": path} | ({"priority": priority} if priority else {})
            for name, value, path, priority in models.columns
        ],
        "schema": {"openAPIV3Schema": root_schema(models.job, status=models.status)},
    }
    accepted = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": names.plural,
        "singular": kind.lower(),
        "shortNames": [models.short_name],
        "categories": ["kubetune"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.plural}.{API_GROUP}"},
        "spec": {"group": API_GROUP, "names": accepted, "scope": "Namespaced", "versions": [version]},
    }


def root_schema(model: type[ApiModel], *, status: type[ApiModel]) -> JsonSchema:
    """The structural schema of a kind; apiVersion, kind and metadata are as every kind has them."""
    spec = structural(model.model_json_schema(by_alias=True))
    for name in ("apiVersion", "kind"):
        spec["properties"][name] = {"type": "string", "description": spec["properties"][name]["description"]}
    spec["properties"]["metadata"] = {"type": "object"}
    spec["properties"]["status"] = without_defaults(
        structural(status.model_json_schema(by_alias=True, mode="serialization"))
    )
    spec["required"] = ["spec"]
    return spec


def structural(schema: JsonSchema) -> JsonSchema:
    """Fold a schema of pydantic's into one that Kubernetes accepts."""
    return _fold(schema, definitions=schema.get("$defs", {}))


def without_defaults(schema: JsonSchema) -> JsonSchema:
    """A schema without default values: what nobody wrote must not stand in a status."""
    kept = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in kept:
        kept["properties"] = {name: without_defaults(each) for name, each in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = without_defaults(kept["items"])
    return kept


def _fold(schema: JsonSchema, *, definitions: dict[str, JsonSchema]) -> JsonSchema:
    schema = _resolve(schema, definitions=definitions)
    folded: JsonSchema = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "description" in schema:
        folded["description"] = " ".join(schema["description"].split())
    if "const" in schema:
        folded["enum"] = [schema["const"]]
    if "properties" in schema:
        computed = {name for name, each in schema["properties"].items() if each.get("readOnly")}
        folded["properties"] = {
            name: _fold(each, definitions=definitions) for name, each in schema["properties"].items()
        }
        folded["required"] = [name for name in schema.get("required", []) if name not in computed]
        if not folded["required"]:
            del folded["required"]
    if "items" in schema:
        folded["items"] = _fold(schema["items"], definitions=definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        folded["additionalProperties"] = _fold(schema["additionalProperties"], definitions=definitions)
    return _ordered(folded)


def _resolve(schema: JsonSchema, *, definitions: dict[str, JsonSchema]) -> JsonSchema:
    """Replace a reference, or an optional field's union with null, by what it stands for; the field's own words win."""
    if "$ref" in schema:
        own = {key: value for key, value in schema.items() if key != "$ref"}
        return _resolve(definitions[schema["$ref"].rpartition("/")[2]], definitions=definitions) | own
    if "anyOf" not in schema:
        return schema
    branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
    own = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    if len(branches) == 1:
        return _resolve(branches[0], definitions=definitions) | own
    if [branch.get("type") for branch in branches] == ["integer", "string"]:
        return own | {"x-kubernetes-int-or-string": True}
    raise TypeError(f"a structural schema has no unions; found {schema}")


def _ordered(schema: JsonSchema) -> JsonSchema:
    """A schema as a person would write it: what it is first, its children last."""
    first = ("type", "description", "default", "enum", "format")
    last = ("required", "x-kubernetes-validations", "properties", "items", "additionalProperties")
    middle = [key for key in schema if key not in first + last]
    ordered = {key: schema[key] for key in (*first, *middle, *last) if key in schema and schema[key] is not None}
    if rules := ordered.get("x-kubernetes-validations"):
        ordered["x-kubernetes-validations"] = [{"rule": rule["rule"], "message": rule["message"]} for rule in rules]
    return ordered


def crd_text(crd: dict[str, Any]) -> str:
    """The file that `kubectl apply -f crds/` reads."""
    return HEADER + dump_manifests([crd])


def chart_text(crd: dict[str, Any]) -> str:
    """The same as a template of the chart, which is upgraded with it and, unless told otherwise, outlives it."""
    text = crd_text(crd)
    assert "{{" not in text, "a description holds what Helm takes for a template"  # noqa: S101 (ours)
    name = f"  name: {crd['metadata']['name']}\n"
    return "{{- if .Values.crds.enabled }}\n" + text.replace(name, name + KEEP, 1) + "{{- end }}\n"


def generated_files() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    files: dict[Path, str] = {}
    for kind in MODELS:
        crd, name = crd_of(kind), KINDS[kind].plural
        files[ROOT / "crds" / f"{name}.yaml"] = crd_text(crd)
        files[ROOT / "helm" / "kubetune" / "templates" / "crds" / f"{name}.yaml"] = chart_text(crd)
        files[ROOT / "docs" / "reference" / f"{kind.lower()}.md"] = reference_of(crd)
    return files


def main() -> int:
    """Write the generated files, or with --check compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kubetune_operator.api.crd", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit 1 on a difference")
    check = parser.parse_args().check
    if not (ROOT / "pyproject.toml").is_file():
        sys.stderr.write("the CRDs are generated in a checkout of kubetune, not in an installed package\n")
        return 1
    stale = [path for path, text in generated_files().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.relative_to(ROOT)} does not match the models; run `make generate`\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated_files()[path])
            sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
