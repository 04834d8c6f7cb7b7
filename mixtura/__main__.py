"""`python -m mixtura` is `mixtura`."""

from mixtura.cli import main

main()
