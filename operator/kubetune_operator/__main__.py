"""Start of the operator: `python -m kubetune_operator`. Its settings are environment variables, see `settings`."""

import asyncio
import logging
import os
import sys

from kubetune_operator.errors import OperatorError
from kubetune_operator.handlers import Operator
from kubetune_operator.settings import load_settings


def main() -> int:
    """Run the operator until it is told to stop.

    Returns:
        The exit code of the process.
    """
    try:
        settings = load_settings(os.environ)
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr
        )
        logging.getLogger("kopf").setLevel("DEBUG" if settings.log_level == "DEBUG" else "WARNING")
        asyncio.run(Operator(settings).run())
    except OperatorError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
