"""A reconstructor that fails while it runs, on pictures that are all but white: a real ONNX file, and its operator.

It is what a linear reconstruction would be, Φᵀ y, but for one ``Gather``: it looks for an entry of a list of one, and a
measurement above a limit makes that the second.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from encoder.sampling import MID_GREY, Operator, finest_steps

BLOCK, ROWS = 16, 4
_LIMIT = 125.5
"""Of a level; a white block's first is 126, and one of 250 has 121."""


def operator() -> Operator:
    """The mean of a block and three more rows, orthonormal."""
    drawn = np.random.default_rng(0).normal(size=(BLOCK**2, ROWS))
    drawn[:, 0] = 1
    phi = np.linalg.qr(drawn)[0].T.astype(np.float32)
    phi[0] = np.abs(phi[0])
    return Operator(phi, finest_steps(phi), BLOCK)


def write(path: Path) -> None:
    """The reconstructor of ``operator``."""
    phi = operator()
    weight = (phi.phi * phi.steps[:, None]).T.reshape(BLOCK**2, ROWS, 1, 1)
    constants = {
        "weight": weight,
        "grey": np.float32(MID_GREY),
        "limit": np.float32(_LIMIT),
        "list": np.zeros(1, np.float32),
        "axis": np.array([1]),
        "low": np.float32(0),
        "high": np.float32(255),
    }
    nodes = [
        helper.make_node("Cast", ["measurements"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["levels"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["above"]),
        helper.make_node("Cast", ["above"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["list", "index"], ["nothing"]),
        helper.make_node("Conv", ["levels", "weight"], ["blocks"]),
        helper.make_node("DepthToSpace", ["blocks"], ["centred"], blocksize=BLOCK),
        helper.make_node("Add", ["centred", "grey"], ["whole"]),
        helper.make_node("Add", ["whole", "nothing"], ["sum"]),
        helper.make_node("Squeeze", ["sum", "axis"], ["gray"]),
        helper.make_node("Clip", ["gray", "low", "high"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["pictures"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "fails on white",
        [helper.make_tensor_value_info("measurements", TensorProto.INT8, ["n", ROWS, "h", "w"])],
        [helper.make_tensor_value_info("pictures", TensorProto.UINT8, ["n", "H", "W"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    told = {"format": "1", "rendition": "veiled", "operator_id": phi.id, "block": str(BLOCK)}
    helper.set_model_props(model, {f"veilcam.{key}": value for key, value in told.items()})
    onnx.save(model, path)
