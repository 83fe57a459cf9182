"""What is loaded into the node is what was built: whole layers, and images that do not change by themselves."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.cluster import images, oci


def test_an_image_of_files_is_the_same_bytes_each_time_and_its_digests_hold(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    archives = [tmp_path / "one.tar", tmp_path / "two.tar"]
    for archive in archives:
        oci.write_image(archive, reference="localhost/x:1", files={"/program": program}, entrypoint=["/program"])
        os.utime(program, (1, 1))
    assert archives[0].read_bytes() == archives[1].read_bytes()

    members = contents(archives[0].read_bytes())
    for name, content in members.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/{oci.Blob('', content).digest.replace(':', '/')}"
    index = json.loads(members["index.json"])
    manifest = json.loads(members[blob_name(index["manifests"][0]["digest"])])
    config = json.loads(members[blob_name(manifest["config"]["digest"])])
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert contents(members[blob_name(manifest["layers"][0]["digest"])]) == {"program": b"\x7fELF"}


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device file needs root")
def test_a_layer_carries_files_links_modes_and_deletions(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir(mode=0o750)
    (tmp_path / "opt" / "code.py").write_text("print()")
    (tmp_path / "opt" / "link").symlink_to("code.py")
    os.mknod(tmp_path / "opt" / "gone", 0o20000, os.makedev(0, 0))

    layer = images._tar_of_changes(tmp_path)

    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        assert {member.name for member in archive} == {"opt", "opt/code.py", "opt/link", "opt/.wh.gone"}
        assert archive.getmember("opt").mode == 0o750
        assert archive.getmember("opt/link").linkname == "code.py"
        assert archive.getmember("opt/.wh.gone").isreg()


@pytest.mark.parametrize("name", images.IMAGES)
def test_the_key_of_the_dependencies_follows_the_pins_and_not_the_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_text((images.ROOT / file).read_text())
    monkeypatch.setattr(images, "ROOT", tmp_path)
    image = images.IMAGES[name]
    before = images._dependencies_key(image, "base")

    (tmp_path / "pyproject.toml").write_text((tmp_path / "pyproject.toml").read_text() + "\n[tool.other]\nx = 1\n")
    assert images._dependencies_key(image, "base") == before
    (tmp_path / "constraints.txt").write_text("pydantic==1\n")
    assert images._dependencies_key(image, "base") != before


def test_settings_of_the_building_machine_reach_the_build_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://index.example/simple?a='b'")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for the build")
    with images._build_secret() as path:
        written = path.read_text()
        assert path.stat().st_mode & 0o077 == 0
    assert "AWS" not in written
    assert """export PIP_INDEX_URL='http://index.example/simple?a='"'"'b'"'"''\n""" in written
    assert not path.exists()


def contents(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened if member.isreg()}  # type: ignore[union-attr]


def blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
