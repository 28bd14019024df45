"""``python -m quantfix`` is the command ``quantfix``."""

from search.cli.main import main

main()
