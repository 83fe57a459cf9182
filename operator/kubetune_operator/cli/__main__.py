"""`python -m kubetune_operator.cli` is `kubetune`."""

from kubetune_operator.cli import main

main()
