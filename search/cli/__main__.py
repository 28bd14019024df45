"""``python -m search.cli`` is the command ``quantfix``."""

from search.cli.main import main

main()
