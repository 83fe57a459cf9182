"""The image format, as far as it is needed here: images of a few files written without a build tool, and archives."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
INDEX: Final = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Blob:
    """Bytes and what they are."""

    media_type: str
    content: bytes

    @property
    def digest(self) -> str:
        """The content's hash as the format writes it."""
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"

    @property
    def descriptor(self) -> dict[str, Any]:
        """How other blobs refer to this one."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.content)}


def write_image(path: Path, *, reference: str, files: Mapping[str, Path], entrypoint: Sequence[str]) -> None:
    """Write an archive of an image that holds `files` (name inside: file outside) and nothing else.

    The same input gives the same bytes, so an image that has not changed is not loaded again.
    """
    layer = Blob(LAYER, _layer(files))
    config = json_blob(CONFIG, {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": "65532:65532"},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    })  # fmt: skip
    manifest = image_manifest(config, [layer.descriptor])
    with tarfile.open(path, "w") as archive:
        for blob in (layer, config, manifest):
            add_blob(archive, blob)
        add_index(archive, reference=reference, manifest=manifest.descriptor)


def image_manifest(config: Blob, layers: Sequence[Mapping[str, Any]]) -> Blob:
    """What ties a configuration and the descriptors of layers, bottom first, together to an image."""
    content = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor, "layers": list(layers)}
    return json_blob(MANIFEST, content)


def json_blob(media_type: str, content: Mapping[str, Any]) -> Blob:
    """A blob of JSON; the same content gives the same bytes."""
    return Blob(media_type, json.dumps(content, sort_keys=True).encode())


def add_blob(archive: tarfile.TarFile, blob: Blob) -> None:
    """Add a blob where the format wants it."""
    add_bytes(archive, f"blobs/{blob.digest.replace(':', '/')}", blob.content)


def add_index(archive: tarfile.TarFile, *, reference: str, manifest: Mapping[str, Any]) -> None:
    """Add what makes an archive of blobs an image called `reference`."""
    annotations = {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference}
    manifests = [{**manifest, "annotations": annotations}]
    add_bytes(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    add_bytes(archive, "index.json", json_blob(INDEX, {"schemaVersion": 2, "manifests": manifests}).content)


def add_bytes(archive: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    """Add a file of these bytes, with nothing in its header that changes from one time to the next."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode
    archive.addfile(entry, io.BytesIO(content))


def _layer(files: Mapping[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in sorted(files.items()):
            add_bytes(archive, name.lstrip("/"), path.read_bytes(), mode=0o755)
    return buffer.getvalue()
