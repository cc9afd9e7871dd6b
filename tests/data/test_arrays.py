"""Arrays in .npy files: what NumPy reads, in threads too, and nothing else."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vlprompt.data.arrays import head, open_array

RECORD = np.dtype([("classes", "<u2", (3,)), ("rest", "<f2")])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(np.uint8, (4, 5, 3)), (np.float32, (7,)), (RECORD, (2, 6)), (np.float64, ()), (np.int64, (0, 3))],
)
def test_arrays_are_those_that_numpy_reads(dtype, shape, tmp_path: Path) -> None:
    array = np.frombuffer(np.random.default_rng(0).bytes(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize), dtype)
    file = tmp_path / "a.npy"
    np.save(file, array.reshape(shape))
    assert file.read_bytes() == head(dtype, shape) + array.tobytes()
    for given in (shape, None):
        found = open_array(file, dtype, given)
        assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
        assert found.tobytes() == np.load(file).tobytes() == array.tobytes()


def test_a_head_filled_up_in_another_way_is_read(tmp_path: Path) -> None:
    file, array = tmp_path / "a.npy", np.arange(6, dtype=np.uint8)
    text = head(np.uint8, (6,))[10:].strip() + b"\n"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array.tobytes())
    assert open_array(file, np.uint8).tolist() == np.load(file).tolist() == array.tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        head(np.uint8, (2, 3)),
        head(np.uint8, (2, 3)) + b"12345",
        head(np.uint8, (2, 3)) + b"1234567",
        head(np.uint8, (3, 2)) + b"123456",
        head(np.int8, (2, 3)) + b"123456",
        head(np.uint8, (2, 3)).replace(b"False", b"True ") + b"123456",
        head(np.uint8, (2, 3)).replace(b"\x01\x00", b"\x09\x00", 1) + b"123456",
        head(np.uint8, (10**30,)),
    ],
)
def test_anything_else_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"instead of|bytes, which are not"):
        open_array(file, np.uint8, (2, 3))


class Finalised:
    """Garbage whose end runs Python, so that another thread may come in between."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        for _ in range(50):
            pass


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    """With np.load, some of these fail on Python 3.11: "AST constructor recursion depth mismatch"."""
    file, array = tmp_path / "a.npy", np.zeros((3, 4), RECORD)
    np.save(file, array)

    def read(_: int) -> tuple[int, ...]:
        for _ in range(5):
            Finalised()
        return open_array(file, RECORD).shape

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(50)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(read, range(3000))) == {(3, 4)}
    finally:
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
