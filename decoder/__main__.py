"""``python -m decoder`` is ``veilcam-decode``."""

from decoder.cli import main

main()
