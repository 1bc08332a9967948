"""`python -m deploy` is the `vespo` command."""

from deploy.cli import main

main()
