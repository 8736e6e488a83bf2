"""The graph of a fitted whitening."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

import polywhiten
from polywhiten import checks
from polywhiten.embeddings.exported_map import exported_map

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening

INPUT, OUTPUT = "embeddings", "whitened"
MIN_OPSET = 13  # from which on ReduceSum takes its axes as an input


def model(whitening: Whitening, opset: int = 17) -> onnx.ModelProto:
    """Return a fitted whitening as an ONNX model, which computes what `whitening.transform` computes.

    Parameters
    ----------
    whitening : Whitening
        The fitted estimator of d features, with outputs of k features.
    opset : int
        The version of ONNX's operators that the model uses, from 13 on. A model that it will be merged with has to
        have the same.

    Returns
    -------
    onnx.ModelProto
        The model. Its input `embeddings` has the shape (batch, d), and its output `whitened` the shape (batch, k), both
        in float32 and for any size of the batch.

    Raises
    ------
    TypeError
        `whitening` isn't a `polywhiten.Whitening`, or `opset` isn't an integer.
    ValueError
        The installed onnx has no such `opset`, it is below 13, or float32 can't hold the map, as its entries are too
        large or too small.
    sklearn.exceptions.NotFittedError
        The whitening isn't fitted.

    Notes
    -----
    The model subtracts the mean before it multiplies, so means far above the deviations cost no digits. With
    `normalize=True`, nodes after the product divide each row by its length and leave rows of zeros as they are.

    Examples
    --------
    >>> import numpy as np, onnx, polywhiten
    >>> from polywhiten.onnx import model
    >>> x = np.random.default_rng(0).normal(size=(500, 4)) @ np.triu(np.ones((4, 4)))
    >>> whitening = polywhiten.Whitening(normalize=True).fit(x)
    >>> [node.op_type for node in model(whitening).graph.node]
    ['Sub', 'Gemm', 'Mul', 'ReduceSum', 'Sqrt', 'Equal', 'Where', 'Div']
    """
    opset = checks.check_integer("opset", opset)
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ValueError(f"opset={opset} isn't possible: use one from {MIN_OPSET} to {newest}, which onnx has")
    exported = exported_map(whitening, np.finfo(np.float32), centered=True)
    k, d = exported.weight.shape
    constants: dict[str, np.ndarray | np.generic] = {
        name: np.asarray(getattr(exported, name), np.float32) for name in ("center", "weight", "bias")
    }
    nodes = [
        helper.make_node("Sub", [INPUT, "center"], ["centered"]),
        helper.make_node("Gemm", ["centered", "weight", "bias"], [OUTPUT], transB=1),
    ]
    if exported.normalize:
        nodes[-1].output[0] = "unscaled"
        nodes += _unit_length("unscaled", OUTPUT)
        constants |= {"last_axis": np.array([-1]), "zero": np.float32(0), "one": np.float32(1)}
    graph = helper.make_graph(
        nodes,
        "whitening",
        [helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", d])],
        [helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["batch", k])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    operators = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),  # for older runtimes too
        producer_name="polywhiten",
        producer_version=polywhiten.__version__,
    )


def _unit_length(x: str, y: str) -> list[onnx.NodeProto]:
    """Return nodes that divide each row by its length, or by 1 where that is 0."""
    return [
        helper.make_node("Mul", [x, x], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "last_axis"], ["squared_length"], keepdims=1),
        helper.make_node("Sqrt", ["squared_length"], ["length"]),
        helper.make_node("Equal", ["length", "zero"], ["is_zero"]),
        helper.make_node("Where", ["is_zero", "one", "length"], ["divisor"]),
        helper.make_node("Div", [x, "divisor"], [y]),
    ]
