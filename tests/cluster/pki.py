"""The cluster's certificates: one authority, one certificate per component, a key pair for service account tokens."""

import base64
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = timedelta(days=365)


@dataclass(frozen=True)
class Identity:
    """Who a component is to the API server.

    Attributes:
        name: The user name, and the name of its files.
        groups: The groups that the user belongs to.
        hosts: Names and addresses that it serves under; empty for a pure client.
    """

    name: str
    groups: Sequence[str] = ()
    hosts: Sequence[str] = ()


class Authority:
    """A certificate authority in a folder of its own, made when the folder has none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.certificate = directory / "ca.crt"
        directory.mkdir(parents=True, exist_ok=True)
        if not self.certificate.exists():
            self._make()
        self._key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
        self._authority = x509.load_pem_x509_certificate(self.certificate.read_bytes())

    def issue(self, identity: Identity) -> tuple[Path, Path]:
        """Write a fresh certificate and its key; returns the two paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in identity.groups]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(subject, self._authority.subject, key).add_extension(
            x509.ExtendedKeyUsage(usages), critical=False
        )
        if identity.hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in identity.hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())  # type: ignore[arg-type]
        return self._write(identity.name.replace(":", "-"), certificate, key)

    def kubeconfig(self, identity: Identity, *, server: str, path: Path) -> Path:
        """Write a kubeconfig for `identity` that holds everything it needs; returns `path`."""
        certificate, key = self.issue(identity)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "local", "cluster": {"server": server, **_data("certificate-authority", self.certificate)}}
            ],
            "users": [{"name": "local", "user": _data("client-certificate", certificate) | _data("client-key", key)}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "local"}}],
            "current-context": "local",
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(content))
        return path

    def service_account_keys(self) -> tuple[Path, Path]:
        """The public and the private key of service account tokens, made once per folder."""
        public, private = self.directory / "sa.pub", self.directory / "sa.key"
        if not public.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            _write_key(private, key)
            public.write_bytes(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
        return public, private

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubetune-ca")])
        builder = _builder(name, name, key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self._write("ca", builder.sign(key, hashes.SHA256()), key)

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        certificate_path, key_path = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        _write_key(key_path, key)
        certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return certificate_path, key_path


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + VALID)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _data(name: str, path: Path) -> dict[str, str]:
    return {f"{name}-data": base64.b64encode(path.read_bytes()).decode()}
