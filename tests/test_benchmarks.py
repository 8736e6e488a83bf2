"""Tests of the benchmarks: the textbook's gradient, the guard's verdicts, and the organization of a GPU's cases."""

import csv
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import reference

import polywhiten as pw
from polywhiten.gpu_launches import gpu_launches

FOLDER = Path(__file__).parent.parent / "benchmarks"  # a folder of scripts that isn't installed
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


def test_bars_may_differ_with_avx2(script):
    bars = script("bars")
    mean = next(b for b in bars.BARS if (b.backend, b.what, b.competitor) == ("torch", "iter_norm", "textbook"))
    records = [record(script, "textbook", 0.38, device=device) for device in ("cpu", bars.AVX2)]
    assert [(v.device, v.met) for v in bars.verdicts(records, [mean])] == [("cpu", True), (bars.AVX2, False)]


def test_the_table_has_the_processors_side_by_side(script):
    report, avx2 = script("report"), script("bars").AVX2
    records = [record(script, "textbook", ratio, device=device) for device, ratio in ((avx2, 0.38), ("cpu", 0.2))]
    records.append(record(script, "textbook", 0.5, backend="jax", mode="jit"))
    lines = report.table(records).splitlines()
    assert "| | competitor | statistic over shapes | bar | measured | bar, AVX2 | measured, AVX2 |" in lines
    mean = "| PyTorch: IterNorm, training | textbook | geometric mean | 0.4 | 0.2 | 0.36 | 0.38, missed |"
    assert [line for line in lines if "PyTorch: IterNorm" in line and "mean" in line] == [mean]
    assert "| JAX (jit): IterNorm, training | textbook | geometric mean | 0.667 | 0.5 |  |  |" in lines


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


# ---------------------------------------------------------------- the GPU benchmarks, run on the CPU


@pytest.fixture
def gpu_script(script):
    pytest.importorskip("torch")
    pytest.importorskip("rich")
    return script


def run_gpu_speed(script, folder, *arguments):
    testing = pytest.importorskip("click.testing")
    command = script("gpu_speed").main
    return testing.CliRunner().invoke(command, ["--device", "cpu", "--out", str(folder), "--seconds", "0", *arguments])


@pytest.mark.filterwarnings("ignore::polywhiten.analysis.InfeasibleWarning")  # the images are few and small
def test_gpu_speed_measures_the_parts_that_are_asked_for_with_both_structures(gpu_script, tmp_path):
    result = run_gpu_speed(gpu_script, tmp_path, "--only", "networks", "--only", "cupy")
    assert result.exit_code == 0, result.output
    with (tmp_path / "gpu-cpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    networks = [row for row in rows if row["what"] == "ResNet-50 with IterNorm"]
    assert {row["structure"] for row in networks if row["competitor"] == "polywhiten"} == {"separate", "joined"}
    assert {row["mode"] for row in networks} == {"eager", "compiled"}
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert {row["what"].partition(" ")[0] for row in rows} == {"ResNet-50", "CuPy,"}
    assert "time on the device" in result.output
    assert "peak MB" in result.output
    assert "host, microseconds" not in result.output


@pytest.mark.parametrize("mode", ["eager", "reduce-overhead"])
def test_host_time_is_of_each_layer_and_structure(gpu_script, mode):
    device, host = import_module("torch").device("cpu"), gpu_script("gpu_host")
    what = "GroupWhitening, host step"
    case = next(case for case in host.host_cases(device) if (case.what, case.mode) == (what, mode))
    rows = case.rows(case.measure(0, lambda: None), "cpu")
    assert [row["structure"] or row["competitor"] for row in rows] == ["separate", "joined", "GroupNorm"]
    assert all(row["host_us"] > 0 and "median_ms" not in row for row in rows)
    assert rows[2]["ratio_joined"] == pytest.approx(rows[1]["host_us"] / rows[2]["host_us"], rel=1e-2)
    cells = [*gpu_script("gpu_summary").on_host(rows).columns[5].cells]
    assert cells[2] == f"{rows[2]['host_us']:.3g}"
    assert all("of 3" in cell for cell in cells[:2])


def test_gpu_speed_fails_what_there_is_no_time_for(gpu_script, tmp_path):
    result = run_gpu_speed(gpu_script, tmp_path, "--only", "networks", "--minutes", "0")
    assert result.exit_code == 1
    assert "not measured: 0 minutes were over" in result.output


def test_a_network_is_left_out_where_torchvision_cannot_be_imported(gpu_script, monkeypatch):
    torch = import_module("torch")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    told = []
    assert gpu_script("gpu_parts").cases(torch.device("cuda"), ["networks"], told.append) == []
    assert "torchvision" in told[0]


def test_each_structure_is_in_use_while_its_competitor_runs_forward_and_backward(gpu_script):
    torch, names = import_module("torch"), gpu_script("gpu_cases").SUBJECTS
    seen = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(gpu_launches())
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(gpu_launches())
            return dy

    def step(x):
        return torch.autograd.grad(Noting.apply(x).sum(), x)

    def build():
        return {names["joined"]: step}, [(torch.ones(2, requires_grad=True),)]

    case = gpu_script("gpu_clock").DeviceCase(torch.device("cpu"), "it", "eager", (2,), build=build)
    assert case.measure(0, lambda: None).failures == {}
    case.compile("joined")
    assert set(seen) == {"joined"}
    assert gpu_launches() == "separate"
    seen.clear()
    case.compile("separate")
    assert seen == []


def test_rows_have_the_ratios_of_both_structures(gpu_script):
    torch, cases = import_module("torch"), gpu_script("gpu_cases")
    case = gpu_script("gpu_layers").layer_case(
        torch.device("cpu"), "IterNorm", "eager", (2, 64, 7, 7), "float32", "NCHW"
    )
    times = {"BatchNorm2d": [1.0, 1.0], "polywhiten, separate": [4.0, 4.0], "polywhiten, joined": [2.0, 2.0]}
    measured = cases.Measured(times, gpu_script("alternating").Failures({"textbook": "OSError: no"}))
    rows = case.rows(measured, "cpu")
    assert [(row["competitor"], row["structure"]) for row in rows] == [
        *(("polywhiten", structure) for structure in ("separate", "joined")),
        *((name, "") for name in ("BatchNorm2d", "textbook")),
    ]
    assert (rows[2]["median_ms"], rows[2]["ratio"], rows[2]["ratio_joined"]) == (1, 4, 2)
    assert rows[3]["failure"] == "OSError: no"
    table = gpu_script("gpu_summary").on_device(rows)
    assert [*table.columns[-2].cells] == ["4 !", "2 !"]


def test_the_report_of_a_gpu_has_the_ratios_of_both_structures_and_a_figure(gpu_script, tmp_path):
    for module in ("matplotlib", "click"):
        pytest.importorskip(module)
    about = {"device": "GPU", "versions": "torch 0", "what": "IterNorm", "mode": "graph", "dtype": "float32"}
    with (tmp_path / "gpu-it.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, gpu_script("gpu_cases").FIELDS)
        writer.writeheader()
        for shape, ratio in (("1x2x3x4", 1), ("2x2x3x4", 4)):
            case = about | {"shape": shape, "layout": "NCHW", "median_ms": 1, "floor_ms": 0.5}
            ratios = {"ratio": ratio, "ratio_joined": ratio / 2}
            writer.writerow(case | {"competitor": "polywhiten", "structure": "separate"})
            writer.writerow(case | {"competitor": "BatchNorm2d"} | ratios)
    (tmp_path / "README.md").write_text("<!-- gpu -->\n<!-- /gpu -->\n", encoding="utf-8")
    arguments = ["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    result = import_module("click.testing").CliRunner().invoke(gpu_script("gpu_report").main, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| IterNorm, groups of 64 / BatchNorm2d | separate | 2, missed |" in text
    assert "| IterNorm, groups of 64 / BatchNorm2d | joined | 1 |" in text
    assert (tmp_path / "gpu-it.png").exists()


def test_what_is_compiled_ahead_is_every_case_of_other_kernels_once(gpu_script):
    torch = import_module("torch")
    found = gpu_script("gpu_parts").cases(torch.device("cpu"), ["layers", "host"], pytest.fail)
    jobs = gpu_script("gpu_compile").jobs(found)
    for structure in ("", "separate", "joined"):
        compiled = [found[place] for places, its in jobs if its == structure for place in places]
        assert not {case.mode for case in compiled} - {"eager", "graph", "compiled", "reduce-overhead"}
        kinds = [(c.what, c.shape, c.dtype, c.layout, c.mode.replace("graph", "eager")) for c in compiled]
        assert len(set(kinds)) == len(kinds)
        assert {(c.what, c.dtype, c.layout) for c in compiled} == {(c.what, c.dtype, c.layout) for c in found}


def test_the_model_of_many_machines_divides_all_but_the_scheduler_and_the_tree(script):
    for module in ("click", "rich"):
        pytest.importorskip(module)
    model = script("embeddings_model")
    rates = model.Rates({"float32": 1e5, "float16": 1e5}, 1e9, 1e10, additions=100.0, network=1e9, tasks=500.0)
    one, hundred = (model.prediction(rates, "float32", machines, 10**5) for machines in (1, 100))
    assert (one.read, one.compute) == pytest.approx((4096, 10_100))  # seconds for 4096 GB, and with 10 000 additions
    assert (hundred.read, hundred.compute) == pytest.approx((40.96, 101))
    assert one.schedule == hundred.schedule == pytest.approx(20)
    assert one.tree == 0
    assert hundred.tree == pytest.approx(3 * 7 * (8 * 1024 * 1025 / 1e9 + 0.01))  # three levels, of eight each
    assert model.prediction(rates, "float16", 1, 10**5).read == pytest.approx(2048)
    assert model.most_machines(rates, "float32", 10**5) == (1024, "scheduler")
