"""The operator's errors.

OperatorError
├── SpecError         the user's fault: what the manifest asks for cannot be done; retrying changes nothing
└── ClusterError      the cluster's fault: try again after a delay
    ├── NotFoundError     the object is not there
    ├── ConflictError     somebody else wrote first, or the object exists already
    └── RefusedError      the API server refuses the request as written (forbidden, invalid, over a quota)
"""


class OperatorError(Exception):
    """Base of all errors that the operator and the command line raise on purpose."""


class SpecError(OperatorError):
    """A manifest breaks rules.

    Args:
        object_name: As a person says it, for example `FineTuneJob team-a/run7`.
        problems: One sentence each: the field as the user typed it, the rule and the value.
    """

    def __init__(self, object_name: str, *, problems: list[str]) -> None:
        super().__init__("\n".join(f"{object_name}: {problem}" for problem in problems))
        self.object_name = object_name
        self.problems = problems


class ClusterError(OperatorError):
    """The API server refused or did not answer.

    Args:
        message: What was tried, on which object, and the answer.
        delay_seconds: When to try again.
    """

    def __init__(self, message: str, *, delay_seconds: float = 5.0) -> None:
        super().__init__(message)
        self.delay_seconds = delay_seconds


class NotFoundError(ClusterError):
    """The object is not there."""


class ConflictError(ClusterError):
    """Somebody else wrote first, or the object exists already."""


class RefusedError(ClusterError):
    """The API server refuses the request as written: forbidden, invalid, or over a quota."""
