"""Run kubectl, and say what it said when it fails."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.binaries import binary


def run(
    kubeconfig: Path,
    *args: str,
    input: str | None = None,  # noqa: A002 (the word that subprocess.run uses)
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run kubectl with a kubeconfig.

    Args:
        kubeconfig: The cluster, and who is asking.
        *args: What stands after `kubectl`.
        input: What it reads from its standard input.
        check: Raise CalledProcessError, with what kubectl said as a note, when it fails.
    """
    command = [str(binary("kubectl")), "--kubeconfig", str(kubeconfig), *args]
    return completed(command, input=input, check=check)


def completed(
    command: Sequence[str],
    *,
    input: str | None = None,  # noqa: A002 (the word that subprocess.run uses)
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; an error that is raised carries what the command said as a note."""
    ran = subprocess.run(command, input=input, check=False, capture_output=True, text=True)
    if check and ran.returncode:
        error = subprocess.CalledProcessError(ran.returncode, command, ran.stdout, ran.stderr)
        error.add_note(ran.stderr.strip())
        raise error
    return ran
