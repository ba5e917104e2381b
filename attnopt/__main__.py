"""`python -m attnopt` is the command."""

from attnopt.cli import main

main()
