"""ONNX's own tests of BatchNormalization (``onnx.backend.test``) by the functional: nodes, converted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import _NodeTestCases as node_cases
from onnx.backend.test.case.node import batch_normalization as batch_normalization  # its import adds its cases

import batchnorm as bn

# Not collect_testcases(), which makes the data of every operator there is.
NODES = {case.name: case for case in node_cases if case.name.startswith("test_batchnorm")}
MODELS = sorted((Path(onnx.backend.test.__file__).parent / "data" / "pytorch-converted").glob("test_BatchNorm*"))


def run(model: onnx.ModelProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The model's one BatchNormalization node, by :func:`bn.nn.functional.batch_norm`."""
    (node,) = (node for node in model.graph.node if node.op_type == "BatchNormalization")
    settings: dict[str, Any] = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    given = [entry.name for entry in model.graph.input if entry.name not in values]
    values |= dict(zip(given, inputs, strict=True))
    names = ("X", "scale", "B", "input_mean", "input_var")
    arrays = dict(zip(names, (torch.tensor(values[name]) for name in node.input), strict=True))
    decay, epsilon = settings.get("momentum", 0.9), settings.get("epsilon", 1e-5)
    x = arrays.pop("X")
    state, options = bn.nn.state.from_onnx(arrays, decay, epsilon)
    training = bool(settings.get("training_mode", 0))
    y = bn.nn.functional.batch_norm(
        x,
        state["running_mean"],
        state["running_var"],
        state["weight"],
        state["bias"],
        training,
        options["momentum"],
        options["eps"],
        ddof=options["ddof"],
    )
    outputs = (y, state["running_mean"], state["running_var"]) if training else (y,)
    return [tensor.numpy() for tensor in outputs]


def test_the_cases_are_the_ones_we_know():
    """A new version of ONNX with more of them is to be looked at."""
    assert sorted(NODES) == [
        "test_batchnorm_epsilon",
        "test_batchnorm_epsilon_training_mode",
        "test_batchnorm_example",
        "test_batchnorm_example_training_mode",
    ]
    assert len(MODELS) == 5


@pytest.mark.parametrize("name", NODES)
def test_node(name):
    case = NODES[name]
    for inputs, expected in case.data_sets:
        found = run(case.model, inputs)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_converted_model(folder):
    def tensor(name: str) -> np.ndarray:
        return numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / name))

    (found,) = run(onnx.load(folder / "model.onnx"), [tensor("input_0.pb")])
    np.testing.assert_allclose(found, tensor("output_0.pb"), rtol=1e-3, atol=1e-7)
