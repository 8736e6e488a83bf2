"""Embeddings in files: what is read is what was written, and a file that doesn't fit is named in one line."""

import errno
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from polywhiten.embeddings.files import FileError, open_source, pieces  # noqa: E402
from polywhiten.embeddings.files import writers as writers_module  # noqa: E402
from polywhiten.embeddings.files.memory import batch_rows, parse_size  # noqa: E402
from polywhiten.embeddings.files.writers import writing_rows  # noqa: E402

DIMENSION = 5
X = np.random.default_rng(0).normal(size=(100, DIMENSION)).astype("float32")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_npy(array, path="x.npy"):
    np.save(path, array)
    return path


def write_parquet(lists, path="x.parquet", name="embedding", **others):
    parquet.write_table(pa.table({**others, name: lists}), path, row_group_size=30)
    return path


def write_npz(path="x.npz", save=np.savez, **arrays):
    save(path, **arrays)
    return path


def fixed_lists(array):
    return pa.FixedSizeListArray.from_arrays(array.reshape(-1), array.shape[1])


FORMATS = {
    "npy": lambda: write_npy(X),
    "npy in columns": lambda: write_npy(np.asfortranarray(X)),
    "npy of the other byte order": lambda: write_npy(X.astype(X.dtype.newbyteorder())),
    "npz": lambda: write_npz(ids=np.arange(100), x=X),
    "npz, compressed": lambda: write_npz(save=np.savez_compressed, x=X),
    "parquet, fixed size": lambda: write_parquet(fixed_lists(X), id=np.arange(100), tags=[["a"]] * 100),
    "parquet, lists": lambda: write_parquet(pa.array(list(X))),
    "parquet, large lists": lambda: write_parquet(pa.array(list(X), pa.large_list(pa.float32()))),
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_has_the_same_rows_from_any_row_on_and_in_pieces(write):
    source = open_source([write()])
    assert (source.rows, source.dimension, source.dtype) == (100, DIMENSION, np.float32)
    for first in (0, 29, 30, 77):
        batches = [batch.copy() for batch in source.batches(32, first)]  # a batch is valid until the next one
        assert max(map(len, batches)) <= 32
        np.testing.assert_array_equal(np.concatenate(batches), X[first:])
        assert all(batch.dtype == np.float32 and batch.dtype.isnative for batch in batches)
    parts = [pickle.loads(pickle.dumps(piece)) for piece in pieces(source, 45)]
    assert [len(part.read()) for part in parts] == [45, 45, 10]
    np.testing.assert_array_equal(np.concatenate([part.read() for part in parts]), X)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int64"])
def test_dtypes_stay(dtype):
    values = (10 * abs(X)).astype(dtype)
    for path in (write_npy(values), write_parquet(fixed_lists(values))):
        batch = next(open_source([path]).batches(30))
        assert batch.dtype == dtype
        np.testing.assert_array_equal(batch, values[:30])


def test_names_keep_their_order_and_folders_and_patterns_are_sorted():
    Path("folder").mkdir()
    for index, path in enumerate(
        ["folder/b.npy", "folder/a.npy", "c1.npy", "c0.npy", "folder/.hidden.npy", "z[1].npy"]
    ):
        write_npy(np.full((2, 3), index, "float32"), path)
    Path("folder/notes.txt").write_text("not embeddings")
    source = open_source(["z[1].npy", "c*.npy", "folder"])
    expected = ["z[1].npy", "c0.npy", "c1.npy", "folder/a.npy", "folder/b.npy"]
    assert [file.path.as_posix() for file in source.files] == expected
    assert [batch[0, 0] for batch in source.batches(10)] == [5, 3, 2, 1, 0]
    assert [batch[0, 0] for batch in source.batches(10, 5)] == [2, 1, 0]
    assert [len(batch) for batch in source.batches(10, 5)] == [1, 2, 2]


def test_files_without_rows_are_passed_over():
    empty = write_parquet(pa.array([], pa.list_(pa.float32())), "empty.parquet")
    source = open_source([write_npy(X[:0, :3], "a.npy"), empty, write_npy(X, "b.npy")])
    assert (source.rows, source.dimension) == (100, DIMENSION)
    np.testing.assert_array_equal(next(source.batches(100)), X)


def test_rows_that_are_null_are_nan():
    lists = pa.array([[1.0, 2.0], None, [3.0, None], [4.0, 5.0]])
    (rows,) = open_source([write_parquet(lists)]).batches(10)
    np.testing.assert_array_equal(rows, [[1, 2], [np.nan, np.nan], [3, np.nan], [4, 5]])


def test_one_of_several_arrays_or_columns_is_chosen_by_name():
    np.testing.assert_array_equal(next(open_source([write_npz(a=X, b=2 * X)], key="b").batches(100)), 2 * X)
    path = write_parquet(fixed_lists(X), other=fixed_lists(2 * X))
    np.testing.assert_array_equal(next(open_source([path], column="other").batches(30)), 2 * X[:30])


def truncated(write):
    path = Path(write())
    path.write_bytes(path.read_bytes()[:1200])
    return path


def lengthened(path):
    with open(path, "ab") as file:
        file.write(b"more")
    return path


def text(path):
    Path(path).write_text("0.1 0.2")
    return path


def with_header(old, new):
    content = Path(write_npy(X)).read_bytes()
    assert len(old) == len(new)
    Path("x.npy").write_bytes(content.replace(old, new))
    return "x.npy"


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", "no array")
    return path


def damaged_zip(path):
    np.savez_compressed(path, x=X)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:800] + bytes(100) + content[900:])
    return path


BAD_FILES = {
    "truncated": (lambda: truncated(lambda: write_npy(X)), ["x.npy is truncated", "2,000 bytes", "1,072", "again"]),
    "truncated npz": (lambda: truncated(FORMATS["npz"]), ["x.npz is damaged", "again"]),
    "truncated parquet": (lambda: truncated(FORMATS["parquet, lists"]), ["x.parquet is damaged", "again"]),
    "two arrays": (lambda: lengthened(write_npy(X)), ["x.npy has more than its array", "2,004"]),
    "1-D": (lambda: write_npy(X[0]), ["x.npy has shape (5,)", "(1, 5)"]),
    "3-D": (lambda: write_npy(X[None]), ["x.npy has shape (1, 100, 5)", "(rows, dimension)"]),
    "no numbers in a row": (lambda: write_npy(X[:, :0]), ["x.npy has shape (100, 0)"]),
    "objects": (lambda: write_npy(np.array([[1], [2, 3]], object)), ["x.npy has dtype object", "equal length"]),
    "complex": (lambda: write_npy(X + 0j), ["x.npy has dtype complex64", "float32"]),
    "text": (lambda: text("x.npy"), ["x.npy is not in the .npy format", "numpy.save"]),
    "a bracket": (lambda: with_header(b"}", b"("), ["x.npy is not in the .npy format", "numpy.save"]),
    "a negative shape": (lambda: with_header(b"(100, 5), }  ", b"(-100, -5), }"), ["x.npy is not in the .npy format"]),
    "text as npz": (lambda: text("x.npz"), ["x.npz is damaged", "not a zip file"]),
    "no array in a zip file": (lambda: foreign_zip("x.npz"), ["x.npz is not in the .npy format"]),
    "no file": (lambda: "y.npy", ["y.npy doesn't exist", "pattern"]),
    "no match": (lambda: "y*.npy", ["no file matches y*.npy"]),
    "another format": (lambda: text("x.csv"), ["x.csv is not a .npy, .npz or .parquet file"]),
    "an empty folder": (lambda: Path("empty").mkdir() or "empty", ["folder empty has no .npy"]),
    "no rows": (lambda: write_npy(X[:0]), ["x.npy has no rows"]),
    "no 2-D array": (lambda: write_npz(a=X[0]), ["x.npz has a (5,)", "(rows, dimension)"]),
    "two 2-D arrays": (lambda: write_npz(a=X, b=X), ["several", "a (100, 5), b (100, 5)", "--key"]),
    "no lists": (lambda: write_parquet(X[:, 0]), ["x.parquet has embedding (float)", "column of lists of numbers"]),
    "two columns": (lambda: write_parquet(fixed_lists(X), b=fixed_lists(X)), ["several columns", "--column"]),
}


@pytest.mark.parametrize(("write", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_does_not_fit_is_named_in_one_line(write, words):
    with pytest.raises(FileError) as caught:
        open_source([write()])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_key_or_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(FileError, match=r"x.npz has no array z, but a \(100, 5\)"):
        open_source([write_npz(a=X)], key="z")
    path = write_parquet(fixed_lists(X), id=np.arange(100))
    with pytest.raises(FileError, match=r"x.parquet has no column z, but id \(int64\), embedding"):
        open_source([path], column="z")
    with pytest.raises(FileError, match=r"column id has type int64: a column of lists"):
        open_source([path], column="id")
    with pytest.raises(FileError, match=r"no .npz file is named, in which z could be"):
        open_source([path], key="z")


def test_files_that_do_not_belong_together_are_named():
    a = write_npy(X, "a.npy")
    with pytest.raises(FileError, match=r"b.npy has rows of 3 numbers, and a.npy of 5"):
        open_source([a, write_npy(X[:, :3], "b.npy")])
    with pytest.raises(FileError, match=r"b.npy has dtype int8, and a.npy float32"):
        open_source([a, write_npy(X.astype("int8"), "b.npy")])
    with pytest.raises(FileError, match=r"a.npy is named twice"):
        open_source([a, "a*.npy"])


def test_a_ragged_row_is_named():
    rows = [[1.0, 2.0]] * 40 + [[3.0]] + [[1.0, 2.0]] * 9
    source = open_source([write_parquet(pa.array(rows))])
    for first in (0, 35):
        with pytest.raises(FileError, match=r"x.parquet, row 40 has 1 numbers: all rows need the 2 of the first"):
            list(source.batches(8, first))


def test_nulls_among_integers_are_an_error():
    source = open_source([write_parquet(pa.array([[1, 2], None]))])
    with pytest.raises(FileError, match=r"x.parquet has nulls from row 0 on"):
        list(source.batches(8))


def test_damage_that_shows_later_is_named():
    source = open_source([write_npy(X, "a.npy")])
    write_npy(X[:50], "a.npy")
    with pytest.raises(FileError, match=r"a.npy has been changed"):
        list(source.batches(8))
    with pytest.raises(FileError, match=r"x.npz is damaged"):
        list(open_source([damaged_zip("x.npz")]).batches(8))


def test_the_row_of_a_nan_is_named_with_its_file():
    y = X.copy()
    y[7, 2] = np.inf
    source = open_source([write_npy(X, "a.npy"), write_npy(y, "b.npy")])
    assert source.nonfinite_error(y[:7], 100) is None
    assert "b.npy, row 7 has NaN or infinity" in str(source.nonfinite_error(y[4:10], 104))


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("path", ["y.npy", "y.parquet"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_written_rows_are_read_again(path, dtype):
    with writing_rows(Path(path), 100, DIMENSION, np.dtype(dtype), column="embedding") as write:
        write(X[:30])
        write(np.asfortranarray(X[30:]))
        assert not Path(path).exists()
    source = open_source([path])
    assert source.dtype == dtype
    np.testing.assert_array_equal(np.concatenate([b.copy() for b in source.batches(64)]), X.astype(dtype))
    assert os.listdir() == [path]


@pytest.mark.parametrize("path", ["y.npy", "y.parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_interrupted_leaves_no_file_and_an_earlier_one_stays(path, error):
    Path(path).write_text("earlier")

    def write_and_fail():
        with writing_rows(Path(path), 100, DIMENSION, X.dtype, column="embedding") as write:
            write(X[:30])
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert os.listdir() == [path]
    assert Path(path).read_text() == "earlier"


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from polywhiten.embeddings.files import FileError
from polywhiten.embeddings.files.writers import writing_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for path in sys.argv[1:]:
    try:
        with writing_rows(Path(path), 10_000, 5, np.dtype("float32"), column="e") as write:
            for _ in range(10):
                write(np.zeros((1000, 5), "float32"))
    except FileError as error:
        print(error)
"""


def test_a_file_that_cannot_grow_is_removed_and_named():
    """The system refuses to write more than 50 kB, as a full disk does."""
    pytest.importorskip("resource")
    command = [sys.executable, "-P", "-c", LIMITED, "y.npy", "y.parquet"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"{path} can't be written ({os.strerror(errno.EFBIG)})" for path in ("y.npy", "y.parquet")]
    assert os.listdir() == []


def test_an_output_that_does_not_fit_on_the_disk_is_not_started(monkeypatch):
    usage = writers_module.shutil.disk_usage(".")
    with monkeypatch.context() as patched:
        patched.setattr(writers_module.shutil, "disk_usage", lambda path: usage._replace(free=1999))
        with (
            pytest.raises(FileError, match=r"1,999 bytes free, and the output takes 2,000"),
            writing_rows(Path("y.npy"), 100, DIMENSION, X.dtype, column="e"),
        ):
            pass
    with (
        pytest.raises(FileError, match=r"nowhere can't be written to \(No such file"),
        writing_rows(Path("nowhere/y.npy"), 1, 1, X.dtype, column="e"),
    ):
        pass
    assert os.listdir() == []


# ---------------------------------------------------------------- memory


def test_sizes_have_units():
    assert [parse_size(size) for size in ("1", "2k", "500MB", "1.5GiB", "2 gb", "1T")] == [
        1, 2048, 500_000_000, 3 * 2**29, 2_000_000_000, 2**40,
    ]  # fmt: skip
    for wrong in ("", "many", "-1GB", "1XB", "1e9", "MB"):
        with pytest.raises(ValueError, match="is not a size: write a number and a unit"):
            parse_size(wrong)


def test_batches_are_smaller_with_less_memory_and_never_too_small():
    plenty = batch_rows(2**40, 1024, 4, 0)
    assert plenty == 16384
    assert batch_rows(2**40, 128, 4, 0) * 128 * 4 == 2**25
    assert batch_rows(2**40, 16384, 4, 0) == 1024  # a block of the kernels
    with pytest.raises(ValueError, match=r"1 MiB are too few for rows of 1024 numbers: at least \d+ MiB") as caught:
        batch_rows(2**20, 1024, 4, 0)
    needed = int(str(caught.value).split()[-4])
    assert 200 < batch_rows((needed + 16) * 2**20, 1024, 4, 0) < plenty
