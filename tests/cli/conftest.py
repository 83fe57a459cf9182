"""The command line in this process, and what it printed."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kubetune_operator.cli import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def kubetune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `kubetune` with these arguments."""

    def run(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run
