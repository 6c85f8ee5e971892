"""``python -m encoder`` is ``veilcam-encode``."""

from encoder.cli import main

main()
