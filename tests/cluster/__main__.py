"""`python -m tests.cluster`: bring the local cluster up and down, and images into it."""

import argparse
import shlex
import subprocess
import sys

from tests.cluster import binaries, images, local
from tests.cluster.prune import prune


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        return COMMANDS[chosen.command](chosen)
    except (RuntimeError, TimeoutError, ValueError) as error:
        print(error, file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"{shlex.join(error.cmd)}:", error.stderr, sep="\n", file=sys.stderr)
    return 1


def _up(_: argparse.Namespace) -> int:
    cluster = local.up()
    print(f"the cluster is up: export KUBECONFIG={cluster.kubeconfig}")
    return 0


def _down(_: argparse.Namespace) -> int:
    local.down()
    return 0


def _status(_: argparse.Namespace) -> int:
    if not local.is_up():
        print("down")
        return 1
    print("up", f"kubeconfig: {local.running().kubeconfig}", f"logs: {local.logs()}", sep="\n")
    print(local.running().kubectl("get", "nodes,pods", "-A", check=False).stdout, end="")
    return 0


def _load(chosen: argparse.Namespace) -> int:
    local.load(*chosen.images)
    return 0


def _install(_: argparse.Namespace) -> int:
    local.bring_up()
    return 0


def _s3(_: argparse.Namespace) -> int:
    print(local.start_s3())
    return 0


def _kubeconfig(_: argparse.Namespace) -> int:
    print(local.running().kubeconfig)
    return 0


def _kubectl(chosen: argparse.Namespace) -> int:
    ran = local.running().kubectl(*chosen.arguments, check=False)
    print(ran.stdout, end="")
    print(ran.stderr, end="", file=sys.stderr)
    return ran.returncode


def _logs(chosen: argparse.Namespace) -> int:
    folder = local.logs()
    for path in sorted(folder.rglob("*.log")):
        if not chosen.name or chosen.name in str(path.relative_to(folder)):
            print(f"--- {path}")
            print("\n".join(path.read_text(errors="replace").splitlines()[-chosen.lines :]))
    return 0


def _build(chosen: argparse.Namespace) -> int:
    if chosen.programs:
        binaries.ensure(*chosen.programs)
    else:
        local.prepare()
        binaries.ensure("kueue")  # of no cluster, but of tests
    return 0


def _path(chosen: argparse.Namespace) -> int:
    print(binaries.binary(chosen.program))
    return 0


def _prune(_: argparse.Namespace) -> int:
    prune()
    return 0


COMMANDS = {
    "up": _up, "down": _down, "status": _status, "load": _load, "install": _install, "s3": _s3,
    "kubeconfig": _kubeconfig, "kubectl": _kubectl, "logs": _logs, "build": _build, "path": _path, "prune": _prune,
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    programs = sorted(name for group in binaries.GROUPS.values() for name in group)
    commands.add_parser("up", help="bring the cluster up and leave it up")
    commands.add_parser("down", help="take it down; images stay in the cache")
    commands.add_parser("status", help="whether it is up, and what runs in it")
    load = commands.add_parser("load", help="build images from the checkout and bring them into the cluster")
    load.add_argument("images", nargs="+", choices=sorted(images.IMAGES))
    commands.add_parser("install", help="up, both images, the S3 server and the chart")
    commands.add_parser("s3", help="start the S3 server and print where the host reaches it")
    commands.add_parser("kubeconfig", help="print the path of the administrator's kubeconfig")
    kubectl = commands.add_parser("kubectl", help="run kubectl as administrator")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    logs = commands.add_parser("logs", help="print the end of every log, or of those whose path contains NAME")
    logs.add_argument("name", nargs="?", default="")
    logs.add_argument("--lines", type=int, default=40)
    build = commands.add_parser("build", help="build programs into the cache, or all that a cluster and the tests need")
    build.add_argument("programs", nargs="*", metavar="program", help=f"any of {', '.join(programs)}")
    path = commands.add_parser("path", help="print where a program is, built if it has to be")
    path.add_argument("program", choices=programs)
    commands.add_parser("prune", help="remove programs and images that the checkout no longer uses")
    return parser


if __name__ == "__main__":
    sys.exit(main())
