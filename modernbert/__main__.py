"""`python -m modernbert`, for torchrun."""

from modernbert.cli import main

main()
