"""Rules about fields that protobuf can't express, held by both sides."""

import re

CAMERA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CAMERA_NAME_TOLD = "1 to 64 of letters, digits, '.', '_' and '-', a letter or digit first"
MAX_LEVEL = 127
"""Largest magnitude of a quantised measurement: int8 without −128, which the entropy coder keeps as its escape."""
CLOCK_SET = 1_700_000_000
"""Seconds since 1970; a file from before was written while the clock of a machine without a battery wasn't set yet."""
