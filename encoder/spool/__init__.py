"""Frames on the camera's disk until the server has them: parts that are written, kept, sent late, bounded and read."""
