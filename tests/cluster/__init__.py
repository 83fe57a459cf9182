"""The local cluster that the tests and the demo run on; `python -m tests.cluster` drives it.

Two sizes: a control plane alone (`ControlPlane`: etcd and kube-apiserver, no root), and a whole node with containerd
and kubelet (`python -m tests.cluster up`, root). Every program is built from source with Go, kept in
`~/.cache/kubetune`, and talks on loopback and on the cluster's own bridge only.
"""
