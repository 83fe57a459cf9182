"""An output goes to the Hub when it is safe; what a failed push leaves to do is the push alone."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from kubetune_trainer import hub
from kubetune_trainer.config import load_config
from kubetune_trainer.errors import ConfigError, StorageError
from kubetune_trainer.push import push_output
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config
from tests.trainer.hub_server import COMMIT, TOKEN, HubServer

REPO = "models/team/bot"


@pytest.fixture
def server() -> Iterator[HubServer]:
    running = HubServer()
    yield running
    running.stop()


def start(zygote: Zygote, place: Path, name: str, server: HubServer, *, ranks: int = 1, **push: Any) -> Gang:
    config = write_config(
        place / "run.yaml",
        training={"max_steps": 2, "global_batch_size": 2},
        outputs=[{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}],
        push_to_hub={"repo": "team/bot", "output": "merged", **push},
    )
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "home")}
    return Gang.start(
        zygote, place / name, config, ranks=ranks, environment=environment, before="tests.recipes.without_xet"
    )


def test_an_output_becomes_a_commit_with_its_card_and_lineage(zygote: Zygote, place: Path, server: HubServer) -> None:
    gang = start(zygote, place, "ranks", server, ranks=2).succeed()
    message = gang.message()
    [commit] = server.commits
    assert message["pushedToHub"] == {"repo": "team/bot", "commit": commit["oid"]}
    assert commit["summary"] == "FineTuneJob local/run: output merged"
    folder = place / "runs" / "run" / "outputs" / "merged"
    assert server.repos[REPO] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "lineage.json", "config.json", "tokenizer.json"} <= set(server.repos[REPO])
    assert REPO in server.private, "nobody asked for a public one"
    assert gang.events("push")[0]["commit"] == commit["oid"]
    assert json.loads(server.repos[REPO]["lineage.json"])["output"] == "merged"


def test_an_adapter_says_the_commit_of_the_hub_that_it_was_trained_on(
    zygote: Zygote, place: Path, server: HubServer
) -> None:
    server.repos["models/team/base"] = {path.name: path.read_bytes() for path in (place / "model").iterdir()}
    config = write_config(
        place / "run.yaml",
        model={"hub": {"repo": "team/base"}},
        training={"max_steps": 1, "global_batch_size": 2},
        outputs=[{"name": "adapter", "type": "PEFT"}],
    )
    environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "home")}
    gang = Gang.start(zygote, place / "ranks", config, environment=environment, before="tests.recipes.without_xet")
    gang.succeed()
    found = json.loads((place / "runs" / "run" / "outputs" / "adapter" / "adapter_config.json").read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("team/base", COMMIT)


def test_after_a_push_that_failed_only_the_push_is_repeated(zygote: Zygote, place: Path, server: HubServer) -> None:
    server.failing_uploads = 999
    first = start(zygote, place, "first", server, private=False)
    assert first.wait() == [69], first.stderr()
    assert "pushToHub.repo team/bot" in first.message()["message"]
    assert [event["step"] for event in first.events("step")] == [1, 2]
    stored = first.events("output")
    assert [output["name"] for output in stored] == ["merged", "adapter"], "all outputs are safe"
    assert server.commits == []

    server.failing_uploads = 0
    again = start(zygote, place, "again", server, private=False).succeed()
    assert again.events("step") == again.events("output") == []
    assert [event["phase"] for event in again.events("phase")] == ["Pushing"]
    assert again.message()["result"] == "Complete"
    assert again.message()["outputs"] == [
        {key: value for key, value in output.items() if key not in {"event", "time"}} for output in stored
    ]
    assert again.message()["pushedToHub"]["commit"] == server.commits[0]["oid"]
    assert REPO not in server.private

    third = start(zygote, place, "third", server, private=False).succeed()
    assert len(server.commits) == len(server.uploads) == 1, "what is there is not sent again"
    assert third.message()["pushedToHub"] == again.message()["pushedToHub"]


REFUSALS = [
    ("other/bot", TOKEN, "the Hub refused with status 403: You have no rights to create a model under other"),
    ("team/bot", "hf_wrong", "the Hub refused with status 401"),
    ("not//valid", TOKEN, "pushToHub.repo not//valid on the Hub: "),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["another's", "a wrong token", "no name"])
def test_a_push_that_the_hub_refuses_names_the_field(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, refusal: tuple[str, str, str]
) -> None:
    repo, token, words = refusal
    server.refused_owners.add("other")
    with pytest.raises(ConfigError) as caught:
        push_here(place, server, monkeypatch, repo=repo, token=token)
    assert f"FineTuneJob local/run: pushToHub.repo {repo} on the Hub" in str(caught.value)
    assert words in str(caught.value)
    assert server.commits == []


def test_a_card_that_the_hub_does_not_take_is_the_users_to_mend(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "model" / "README.md").write_text("---\nlicense: mine\n---\n")
    server.card_errors.append('"license" must be one of …')
    with pytest.raises(ConfigError, match="license"):
        push_here(place, server, monkeypatch)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own use of its HTTP client
def test_a_hub_that_stumbles_is_asked_again(place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.failing_uploads = 1
    assert push_here(place, server, monkeypatch) == {"repo": "team/bot", "commit": server.commits[0]["oid"]}


EARLIER = [
    {"model.safetensors"},
    {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
    {"adapter_config.json", "adapter_model.safetensors"},
    {"model.gguf", "model.pte", "chat_template.jinja", "vocab.json", "merges.txt", "lineage.json"},
]
OWN = {"README.md", "LICENSE", ".gitattributes", "notes[1].md", "eval.json", "onnx/model.safetensors", "my.safetensors"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own use of its HTTP client
@pytest.mark.parametrize("earlier", EARLIER, ids=["one file", "shards", "adapters", "other formats"])
def test_an_output_takes_the_place_of_another_and_of_nothing_else(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, earlier: set[str]
) -> None:
    server.repos[REPO] = dict.fromkeys(earlier | OWN | {"config.json"}, b"earlier")
    pushed = push_here(place, server, monkeypatch)
    files = {path.name: path.read_bytes() for path in (place / "model").iterdir() if path.is_file()}
    del files["plans.txt"]
    assert server.repos[REPO] == dict.fromkeys(OWN, b"earlier") | files
    assert [commit["oid"] for commit in server.commits] == [(pushed or {})["commit"]], "all in one commit"


def test_a_hub_that_takes_a_connection_and_says_nothing_is_not_waited_for(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match=r"pushToHub\.repo team/bot on the Hub: the Hub cannot be reached"):
            push_here(place, server, monkeypatch)


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError])
def test_a_network_that_fails_below_xet_is_no_crash(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("Network error: Request error")  # hf_xet's words; it tries for minutes before it says them

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(StorageError, match="the Hub cannot be reached: Network error"):
        push_here(place, server, monkeypatch)


def push_here(
    place: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, *, repo: str = "team/bot", token: str = TOKEN
) -> dict[str, str] | None:
    """Pushes the model that the runs begin with, from a folder that holds something else too."""
    files = {path.name: "" for path in (place / "model").iterdir() if path.name != "README.md"}
    (place / "model" / "lineage.json").write_text(json.dumps({"files": files}))
    (place / "model" / "another").mkdir()
    for stray in ("plans.txt", "another/model.safetensors"):
        (place / "model" / stray).write_text("nobody else's business")
    for name, value in {"HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HOME": str(place / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    push = {"repo": repo, "output": "merged"}
    outputs = [{"name": "merged", "type": "HuggingFace"}]
    config = load_config(write_config(place / "run.yaml", outputs=outputs, push_to_hub=push))
    return push_output(config, [{"name": "merged", "uri": f"file://{place}/model"}])
