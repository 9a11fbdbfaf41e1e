"""``python -m advkd.cli``, which launchers of several processes start."""

from ..__main__ import main

main()
