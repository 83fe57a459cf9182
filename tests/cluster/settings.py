"""The fixed points of the native node: its addresses, and the configuration files of its components."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster import controlplane
from tests.cluster.binaries import CNI_PLUGINS
from tests.cluster.paths import CLUSTER, LOGS
from tests.cluster.pki import Authority, Identity

NODE: Final = "node-0"
POD_RANGE: Final = "10.244.0.0/24"
BRIDGE: Final = "cni0"
BRIDGE_ADDRESS: Final = "10.244.0.1"
"""The node's own address: pods reach the API server and the name server there."""
HOST_LINK: Final = "kubetune0"
HOST_ADDRESS: Final = "10.245.0.1"
NODE_ADDRESS: Final = "10.245.0.2"
"""The two ends of the one wire between the host and the node."""
API_PORT: Final = 6443
SERVER: Final = f"https://{NODE_ADDRESS}:{API_PORT}"
API_SERVER_HOSTS: Final = (*controlplane.API_SERVER_HOSTS, BRIDGE_ADDRESS, NODE_ADDRESS)
KUBECONFIG: Final = CLUSTER / "admin.kubeconfig"
CONTAINERD_SOCKET: Final = CLUSTER / "containerd.sock"
PAUSE_IMAGE: Final = "localhost/pause:1"
COMPONENTS_FILE: Final = CLUSTER / "components.json"
CONTROL_PLANE_PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
NODE_PROGRAMS: Final = (
    *CONTROL_PLANE_PROGRAMS, "kube-scheduler", "kubelet", "kube-proxy",
    "containerd", "containerd-shim-runc-v2", "ctr", "coredns", *CNI_PLUGINS,
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """One program of the node.

    Attributes:
        name: Its name; also its log's.
        command: The program and its arguments.
    """

    name: str
    command: Sequence[str]
    path: Sequence[str] = field(default=())
    """Folders that go before its PATH."""


def write(programs: dict[str, Path]) -> None:
    """Write every component's configuration, and the list that the node's first process starts from."""
    authority = Authority(CLUSTER / "pki")
    authority.kubeconfig(controlplane.ADMIN, server=SERVER, path=KUBECONFIG)
    _write_containerd(programs)
    _write_kubelet(authority)
    _write_proxy()
    _write_names()
    components = [*_control_plane(authority, programs), *_node(authority, programs)]
    content = {
        "authority": str(authority.certificate),
        "ctr": str(programs["ctr"]),
        "components": [vars(component) for component in components],
    }
    COMPONENTS_FILE.write_text(json.dumps(content, indent=1))


def _control_plane(authority: Authority, programs: dict[str, Path]) -> list[Component]:
    etcd = controlplane.etcd_arguments(CLUSTER / "etcd", client_port=2379, peer_port=2380)
    api_server = controlplane.api_server_arguments(
        authority, hosts=API_SERVER_HOSTS, port=API_PORT, etcd_port=2379, audit_log=LOGS / "audit.jsonl"
    )
    manager = controlplane.controller_manager_arguments(
        authority, _kubeconfig(authority, controlplane.CONTROLLER_MANAGER)
    )
    scheduler = [
        f"--kubeconfig={_kubeconfig(authority, Identity('system:kube-scheduler'))}",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    advertised = [f"--advertise-address={BRIDGE_ADDRESS}", "--bind-address=0.0.0.0"]
    return [
        Component("etcd", [str(programs["etcd"]), *etcd]),
        Component("kube-apiserver", [str(programs["kube-apiserver"]), *api_server, *advertised]),
        Component("kube-controller-manager", [str(programs["kube-controller-manager"]), *manager]),
        Component("kube-scheduler", [str(programs["kube-scheduler"]), *scheduler]),
    ]


def _node(authority: Authority, programs: dict[str, Path]) -> list[Component]:
    kubelet = [
        f"--config={CLUSTER / 'kubelet.yaml'}",
        f"--kubeconfig={_kubeconfig(authority, Identity(f'system:node:{NODE}', groups=['system:nodes']))}",
        f"--hostname-override={NODE}",
        f"--root-dir={CLUSTER / 'kubelet'}",
        f"--node-ip={BRIDGE_ADDRESS}",
    ]
    _kubeconfig(authority, Identity("system:kube-proxy"))
    _kubeconfig(authority, Identity("system:coredns", groups=["system:masters"]))
    shims = [str(programs["containerd-shim-runc-v2"].parent)]
    return [
        Component("containerd", [str(programs["containerd"]), f"--config={CLUSTER / 'containerd.toml'}"], path=shims),
        Component("kubelet", [str(programs["kubelet"]), *kubelet]),
        Component("kube-proxy", [str(programs["kube-proxy"]), f"--config={CLUSTER / 'proxy.yaml'}"]),
        Component("coredns", [str(programs["coredns"]), f"-conf={CLUSTER / 'Corefile'}"]),
    ]


def _kubeconfig(authority: Authority, identity: Identity) -> Path:
    path = CLUSTER / f"{identity.name.split(':')[1]}.kubeconfig"
    return authority.kubeconfig(identity, server=f"https://127.0.0.1:{API_PORT}", path=path)


def _write_containerd(programs: dict[str, Path]) -> None:
    network = CLUSTER / "cni"
    network.mkdir(exist_ok=True)
    (network / "10-bridge.conflist").write_text(json.dumps(_network()))
    # restrict_oom_score_adj: in a virtual machine a process may not lower its score, and no pod would start.
    (CLUSTER / "containerd.toml").write_text(f"""version = 3
root = "{CLUSTER}/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["{programs["bridge"].parent}"]
  conf_dir = "{network}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false
""")


def _network() -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni",
        "ranges": [[{"subnet": POD_RANGE}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "kubetune", "plugins": [bridge, ports]}


def _write_kubelet(authority: Authority) -> None:
    content = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [BRIDGE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "podLogsDir": str(LOGS / "pods"),
        "volumePluginDir": str(CLUSTER / "volume-plugins"),
        # The host's disk is not the cluster's: neither evict pods nor remove the images that `load` brought.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"nodefs.available": "100Mi", "imagefs.available": "100Mi"},
        "maxPods": 100,
    }
    (CLUSTER / "kubelet.yaml").write_text(yaml.safe_dump(content))


def _write_proxy() -> None:
    content = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(CLUSTER / "kube-proxy.kubeconfig")},
        "mode": "iptables",
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": NODE,
        "conntrack": {"maxPerCore": 0},
    }
    (CLUSTER / "proxy.yaml").write_text(yaml.safe_dump(content))


def _write_names() -> None:
    (CLUSTER / "Corefile").write_text(f""".:53 {{
    bind {BRIDGE_ADDRESS}
    errors
    kubernetes cluster.local in-addr.arpa {{
        endpoint https://127.0.0.1:{API_PORT}
        kubeconfig {shlex.quote(str(CLUSTER / "coredns.kubeconfig"))} local
        pods insecure
    }}
    cache 5
}}
""")
