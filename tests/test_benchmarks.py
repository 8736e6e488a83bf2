"""What the benchmarks rest on: the textbook's own gradient, and the guard's judgement."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import reference

import polywhiten as pw

FOLDER = Path(__file__).parent.parent / "benchmarks"  # scripts, which nothing installs
LAYER = {"iter_norm": 4, "group_whiten": 2}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return import_module


@pytest.mark.parametrize("what", LAYER)
@pytest.mark.parametrize("axis", [1, 3])
def test_textbooks_gradient_is_the_functions(script, what, axis):
    textbook = script("textbook")
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 6, 8, 3, 4)).cumsum(axis=2)
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, dy))
    weight, bias = random.normal(size=(2, 8))
    blocks = textbook.Blocks(what == "group_whiten", LAYER[what], axis)
    y, saved = textbook.forward(np, blocks, x, weight, bias, 5, 1e-3)
    options = {"num_groups" if what == "group_whiten" else "group_size": LAYER[what]}
    options |= {"weight": weight, "bias": bias, "axis": axis, "eps": 1e-3}
    expected = getattr(reference, what)(x, method="newton", iterations=5, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    _, pullback = getattr(pw, f"{what}_vjp")(x, iterations=5, **options)
    for actual, wanted in zip(textbook.backward(np, blocks, saved, dy), pullback(dy), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-9 * abs(wanted).max())


def test_textbooks_gradient_is_that_of_small_differences(script):
    textbook = script("textbook")
    random = np.random.default_rng(0)
    x, dy, direction = random.normal(size=(3, 20, 4))
    weight, bias = random.normal(size=(2, 4))
    blocks, step = textbook.Blocks(per_sample=False, size=4), 1e-6
    _, saved = textbook.forward(np, blocks, x, weight, bias)
    dx, _, _ = textbook.backward(np, blocks, saved, dy)
    above, below = (textbook.forward(np, blocks, x + h * direction, weight, bias)[0] for h in (step, -step))
    assert np.vdot(dx, direction) == pytest.approx(np.vdot(dy, above - below) / (2 * step), rel=1e-6)


def record(script, competitor, ratio, **changes):
    layer = {"what": "iter_norm", "group": 64, "mode": "eager", "measure": "training", "shape": "32x64x56x56"}
    about = {"machine": "", "versions": "", "backend": "torch", "device": "cpu", "layout": "NCHW", "dtype": "float32"}
    return script("records").Record(**(about | layer | {"competitor": competitor, "ratio": ratio} | changes))


@pytest.mark.parametrize(("ratio", "met", "allowed"), [(0.39, True, True), (0.5, False, True), (0.53, False, False)])
def test_guard_lets_pass_what_is_thirty_percent_above_its_bar(script, ratio, met, allowed):
    bars = script("bars")
    mean = next(b for b in bars.BARS if (b.backend, b.what, b.competitor) == ("torch", "iter_norm", "textbook"))
    (verdict,) = bars.verdicts([record(script, "textbook", ratio), record(script, "batch norm", 9.0)], [mean])
    assert (verdict.met, verdict.allowed) == (met, allowed)


def test_bars_are_of_means_and_of_the_worst(script):
    bars = script("bars")
    records = [record(script, "textbook", 0.1), record(script, "textbook", 0.9, layout="NHWC")]
    found = {verdict.bar.statistic: verdict for verdict in bars.verdicts(records)}
    assert found["geometric mean"].value == pytest.approx(0.3)
    assert found["worst"].value == 0.9
    assert "NHWC" in found["worst"].worst


def test_bars_are_of_their_channels(script):
    verdicts = script("bars").verdicts
    narrow, wide = (record(script, "3x3 convolution", 0.3, shape=f"32x{c}x56x56") for c in (64, 128))
    assert [(v.bar.limit, v.met) for v in verdicts([narrow])] == [(0.4, True)]
    assert [(v.bar.limit, v.met) for v in verdicts([wide])] == [(0.25, False)]


def test_kept_bytes_are_a_share_of_the_inputs(script):
    kept = {"measure": "memory", "kept_bytes": 4 * 32 * 64 * 56 * 56 // 50}
    (verdict,) = script("bars").verdicts([record(script, "polywhiten", None, **kept)])
    assert verdict.value == pytest.approx(0.02)


def test_records_are_read_as_they_were_written(script, tmp_path):
    records = script("records")
    some = [record(script, "textbook", 0.5, rounds=7), record(script, "textbook", None, failure="OSError: no")]
    with records.written(tmp_path / "speed.csv") as writer:
        writer.add(some)
    assert records.read(tmp_path / "speed.csv") == some
