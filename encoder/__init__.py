"""What runs on the camera."""

import os

# gRPC's core writes lines of its own beside ours; it reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
