"""`python -m deploy` is the `vespo` command."""

from deploy.cli import main

if __name__ == "__main__":  # the processes of a benchmark import this module again
    main()
