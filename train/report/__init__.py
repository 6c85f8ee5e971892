"""docs/paper.md: the paper's tables and figures beside ours, written by a program from what the runs left."""
