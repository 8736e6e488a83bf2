"""Damaged files of compiled kernels are replaced, and everything works if no file can be written."""

import errno
import os
import warnings

import pytest

numba = pytest.importorskip("numba")

from numba import cfunc, njit, types  # noqa: E402
from numba.core.caching import IndexDataCacheFile  # noqa: E402

from polywhiten.cpu.runtime import cache  # noqa: E402


def double(x):
    return 2 * x


COMPILERS = {"cfunc": lambda compiled: compiled.ctypes(21), "njit": lambda compiled: compiled(21)}


@pytest.fixture(params=COMPILERS)
def doubled(request, tmp_path, monkeypatch):
    """Return a function that loads the kernel as a new process does, and calls it with 21."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compiler = {"cfunc": cfunc, "njit": njit}[request.param]
    return lambda: COMPILERS[request.param](cache.compiled(double, "d", compiler, types.int64(types.int64)))


def files(folder, ending):
    return list(folder.rglob(f"*double*.{ending}"))


def full(self, path):
    """Fail to write, as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "random": lambda content: os.urandom(len(content)),
    "another pickle": lambda content: b"\x80\x04K\x05.",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["nbi", "nbc"], ids=["index", "machine code"])
def test_a_damaged_file_is_replaced_with_a_warning_that_names_it(doubled, tmp_path, ending, damage):
    assert doubled() == 42
    (file,) = files(tmp_path, ending)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert doubled() == 42
    if caught:  # a damaged index may look like one of another version of Numba, which is replaced without a warning
        (warning,) = caught
        assert str(file) in str(warning.message)
    else:
        assert ending == "nbi"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doubled() == 42
    assert len(files(tmp_path, "nbc")) == 1


def test_a_full_disk_keeps_nothing_and_says_so_once(doubled, tmp_path, monkeypatch):
    cache._warn_that_nothing_is_cached.cache_clear()
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert doubled() == doubled() == 42
    (warning,) = caught
    assert "No space left on device" in str(warning.message)
    assert "NUMBA_CACHE_DIR" in str(warning.message)
    assert not files(tmp_path, "nb?")


def test_a_damaged_file_that_can_not_be_replaced_says_so(doubled, tmp_path, monkeypatch):
    assert doubled() == 42
    (file,) = files(tmp_path, "nbc")
    file.write_bytes(b"")
    cache._warn_that_nothing_is_cached.cache_clear()
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert doubled() == 42


def test_a_folder_that_vanishes_is_no_error(doubled, tmp_path):
    assert doubled() == 42
    for file in files(tmp_path, "nb?"):
        file.unlink()
    (folder,) = tmp_path.iterdir()
    folder.rmdir()
    assert doubled() == 42


def test_what_is_wrong_with_a_kernel_itself_is_raised(doubled):
    with pytest.raises(numba.TypingError):
        cache.compiled(lambda x: x.nothing, "d", cfunc, types.int64(types.int64))
