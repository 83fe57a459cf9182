"""The card beside an output says what the Hub asks for, and where the model comes from."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from kubetune_trainer.card import read_head, render_card, write_card
from kubetune_trainer.config import FineTuneConfig, Output
from kubetune_trainer.export import folder_digest
from kubetune_trainer.export.store import StoredOutput, store_output
from kubetune_trainer.lineage import make_lineage
from kubetune_trainer.model_files import FoundOther, LocalModel, find_model
from kubetune_trainer.software import software_digest
from tests.trainer.tiny_model import write_model

BASE_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- chat\n---\n# Tiny\n"
MEASURED = {"step": 12, "epoch": 1.2, "loss": 0.123456789, "validationLoss": 0.25, "learningRate": 1e-4}


def config(folder: Path, **blocks: Any) -> FineTuneConfig:
    values = {
        "run": {"namespace": "team", "name": "support", "uid": "uid-1", "directory": f"file://{folder}/support",
                "cache": f"file://{folder}/cache"},
        "workspace": {"uri": f"file://{folder}"},
        "model": {"hub": {"repo": "org/tiny", "token_secret": {"name": "my-secret", "key": "token"}}},
        "dataset": {"sources": [
            {"name": "tickets", "uri": {"location": "s3://data/tickets.jsonl"}},
            {"name": "alpaca", "hub": {"repo": "tatsu-lab/alpaca"}},
        ]},
        "lora": {"rank": 4},
        "training": {"max_steps": 12},
        "outputs": [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}],
    }  # fmt: skip
    return FineTuneConfig.model_validate({**values, **blocks})


def card_of(folder: Path, *, kind: str = "HuggingFace", base: dict[str, Any] | None = None, **blocks: Any) -> str:
    run, model = config(folder, **blocks), folder / "model"
    if not model.exists():
        write_model(model)
    output = StoredOutput(name="merged", type=kind, uri="s3://out/merged", digest="sha256:77", bytes=9, files={})
    lineage = make_lineage(
        run, model=find_model(f"file://{model}", s3=None, commit="c0ffee"), model_dir=model, outputs=[output],
        sources=[{"name": "tickets", "location": "s3://data/tickets.jsonl", "etag": "abc"},
                 {"name": "alpaca", "location": "tatsu-lab/alpaca", "commit": "beef"}],
    )  # fmt: skip
    return render_card(
        output, config=run, lineage=lineage, base=base or {}, measured=MEASURED, data={"samples": 40, "rows": 20}
    )


@pytest.mark.parametrize(("output", "library"), [("HuggingFace", "transformers"), ("PEFT", "peft")])
def test_the_head_is_what_the_hub_asks_for(tmp_path: Path, output: str, library: str) -> None:
    base = {"license": "apache-2.0", "language": ["en"], "tags": ["chat"], "widget": []}
    head = ModelCard(card_of(tmp_path, kind=output, base=base)).data
    assert head.to_dict() == {
        "base_model": "org/tiny", "library_name": library, "pipeline_tag": "text-generation",
        "tags": ["kubetune", "sft", "lora"], "datasets": ["tatsu-lab/alpaca"], "license": "apache-2.0",
        "language": ["en"],
    }  # fmt: skip


def test_a_place_that_is_no_repository_of_the_hub_stays_out_of_the_head(tmp_path: Path) -> None:
    here = {"uri": {"location": "s3://models/tiny"}}
    data = {"sources": [{"name": "tickets", "uri": {"location": "s3://data/tickets.jsonl"}}]}
    head = ModelCard(card_of(tmp_path, model=here, dataset=data, base={"base_model": "org/older"})).data.to_dict()
    assert not head.keys() & {"base_model", "datasets", "license"}
    ours = {"base_model": "org/first", "tags": ["kubetune", "sft"], "license": "mit"}
    head = ModelCard(card_of(tmp_path, model=here, dataset=data, base=ours)).data.to_dict()
    assert (head["base_model"], head["license"]) == ("org/first", "mit"), "the first model of a chain"


def test_the_text_tells_data_settings_results_and_lineage_with_digests(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KUBETUNE_IMAGE", "trainer@sha256:9")
    card = card_of(tmp_path)
    base_digest, _ = folder_digest(tmp_path / "model")
    for told in (
        "# support", "`org/tiny`, fine-tuned with SFT and LoRA",
        "| tickets | `s3://data/tickets.jsonl` | `abc` |", "| alpaca | `tatsu-lab/alpaca` | `beef` |", "| Rows | 20 |",
        "| Training loss, last step | 0.123457 |", "| Validation loss, last | 0.25 |", "| Optimizer steps | 12 |",
        "FineTuneJob team/support (uid-1)", f"| Base model, digest | `{base_digest}` |", "`c0ffee`",
        f"`sha256:{config(tmp_path).digest()}`", "| Image | `trainer@sha256:9` |",
        f"| Software, digest | `{software_digest()}` |", "`sha256:77`",
    ):  # fmt: skip
        assert told in card, told
    assert "my-secret" not in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (settings["lora"]["rank"], settings["training"]["max_steps"], settings["recipe"]) == (4, 12, "SFT")
    assert settings["dataset"]["max_sequence_length"] == 2048


def test_a_card_changes_neither_files_nor_digest_of_an_output(tmp_path: Path) -> None:
    run, model = config(tmp_path), write_model(tmp_path / "model")
    (model / "README.md").write_text(BASE_CARD)
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.name != "README.md"}
    output = store_output(Output(name="merged", type="HuggingFace"), model, config=run)
    lineage = make_lineage(run, model=find_model(f"file://{model}", s3=None), model_dir=model, outputs=[output])
    write_card(output, config=run, lineage=lineage, base_dir=model, measured=MEASURED, data={})
    folder = Path(output.uri.removeprefix("file://"))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"} == before
    assert folder_digest(folder) == (output.digest, output.bytes)
    assert lineage["model"]["digest"] == output.digest
    assert read_head(folder)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text", ["", "# no head", "---\n- a list\n---\n", "---\na: [\n---\n", "text\n---\na: 1\n---\n"]
)
def test_a_card_without_a_head_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_head(tmp_path) == {}
    assert read_head(tmp_path / "none") == {}


def test_the_models_beside_its_own_have_their_commits_and_digests(tmp_path: Path) -> None:
    run, model = config(tmp_path), write_model(tmp_path / "model")
    found = FoundOther(model=find_model(f"file://{model}", s3=None, commit="f00d"))
    output = StoredOutput(
        name="merged", type="HuggingFace", uri="s3://out/merged", digest="sha256:77", bytes=9, files={}
    )
    lineage = make_lineage(
        run, model=find_model(f"file://{model}", s3=None), model_dir=model, outputs=[output],
        others={"dpo.reference": (found, LocalModel(model_dir=model, base_dir=model, adapter_dir=None))},
        first_adapters=(find_model(f"file://{model}", s3=None), model),
    )  # fmt: skip
    card = render_card(output, config=run, lineage=lineage, base={}, measured=MEASURED, data={})
    digest, _ = folder_digest(model)
    for told in (
        "| `dpo.reference`, commit | `f00d` |", f"| `dpo.reference`, digest | `{digest}` |",
        f"| `lora.adapter`, digest | `{digest}` |",
    ):  # fmt: skip
        assert told in card, told
    assert "`dpo.reference`, adapter" not in card


def test_how_a_reference_is_reached_stays_out_of_the_card(tmp_path: Path) -> None:
    reference = {"hub": {"repo": "org/judge", "token_secret": {"name": "my-secret", "key": "token"}}}
    data = {"sources": [{"name": "pairs", "uri": {"location": "s3://data/pairs.jsonl"}}]}
    card = card_of(tmp_path, recipe="DPO", dpo={"reference": reference}, dataset=data)
    assert "org/judge" in card
    assert "my-secret" not in card
