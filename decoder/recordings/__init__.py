"""Recordings: measurements as they came, in segments that a kill at any byte leaves readable."""
