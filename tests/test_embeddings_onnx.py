"""`polywhiten.onnx.model` makes of a fitted whitening a model with the same outputs, as onnxruntime runs it."""

import numpy as np
import pytest
from embedding_exports import assert_refuses_what_is_not_fitted, each_whitening, embeddings, fitted, integers
from pages import example

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from onnx import helper  # noqa: E402

from polywhiten.onnx import model  # noqa: E402


def outputs(exported, x):
    onnx.checker.check_model(exported, full_check=True)
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    return y


@each_whitening
def test_outputs_are_those_of_the_estimator_for_any_batch_size(arguments):
    whitening = fitted(**arguments)
    exported = model(whitening)
    for rows in (400, 1):
        x = embeddings()[:rows]
        y = outputs(exported, x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, whitening.transform(x.astype("float64")), atol=5e-5)


def test_a_row_that_is_the_mean_becomes_zeros():
    x = np.array([[4, 1], [-4, 1], [0, 2], [0, 0], [0, 1]], dtype="float32")  # the last is the mean, exactly
    whitening = fitted(x, normalize=True)
    y = outputs(model(whitening), x)
    assert (y[-1] == 0).all()
    np.testing.assert_allclose(y, whitening.transform(x), atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_large_means_cost_no_digits(scale):
    x = embeddings(deviations=1000)
    whitening = fitted(x, scale=scale)
    np.testing.assert_allclose(outputs(model(whitening), x), whitening.transform(x.astype("float64")), atol=5e-5)


def test_a_scale_of_integers_is_inside_the_weight():
    x = integers()
    whitening = fitted(x, scale=0.1)
    np.testing.assert_allclose(outputs(model(whitening), x.astype("float32")), whitening.transform(x), atol=5e-5)


@pytest.mark.parametrize(("opset", "ir_version"), [(13, 7), (21, 10)])
def test_the_versions_are_the_oldest_that_will_do(opset, ir_version):
    whitening = fitted(normalize=True)
    exported = model(whitening, opset)
    assert [operators.version for operators in exported.opset_import] == [opset]
    assert exported.ir_version == ir_version
    np.testing.assert_allclose(outputs(exported, embeddings()), whitening.transform(embeddings()), atol=5e-5)


def test_wrong_arguments():
    assert_refuses_what_is_not_fitted(model)
    for opset in (12, 1000):
        with pytest.raises(ValueError, match=rf"opset={opset} isn't possible: use one from 13 to"):
            model(fitted(), opset)
    with pytest.raises(TypeError, match=r"opset=17\.5 must be an integer"):
        model(fitted(), 17.5)


def test_parameters_that_are_set_after_fit_change_the_next_fit_alone():
    whitening = fitted(scale=0.1)
    whitening.set_params(scale=3.0, normalize=True)
    np.testing.assert_allclose(outputs(model(whitening), embeddings()), whitening.transform(embeddings()), atol=5e-5)


def test_a_mean_beyond_float32_is_refused():
    x = embeddings().astype("float64") * 1e36 + 1e39
    with pytest.raises(ValueError, match="can't be exported in float32"):
        model(fitted(x))


def test_the_example_of_a_whitening_after_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whitening = fitted(normalize=True)
    whitening.save("whitening.npz")
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", 12])
        for name in ("x", "weight")  # the whitening has the second name too
    ]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["weight"])], "double", values[:1], values[1:])
    encoder = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(encoder, "encoder.onnx")
    example("embeddings-deploy.md", "ONNX, after a model").run()
    merged = onnx.load("whitened-encoder.onnx")
    assert [output.name for output in merged.graph.output] == ["whitening_whitened"]
    np.testing.assert_allclose(outputs(merged, embeddings() / 2), whitening.transform(embeddings()), atol=5e-5)
