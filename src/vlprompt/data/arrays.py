"""Arrays in ``.npy`` files, read without Python's parser."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

_START = 10  # bytes before the text of a head: magic, version and its length


def head(dtype: DTypeLike, shape: tuple[int, ...]) -> bytes:
    """What stands before the values in a file of such an array, as :func:`numpy.save` writes it."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def open_array(file: Path, dtype: DTypeLike, shape: tuple[int, ...] | None = None) -> NDArray:
    """The array in a file, mapped: of this dtype, and of this shape, or of any.

    :func:`numpy.load` has Python parse the head of a file, which fails now and then where threads of Python 3.11 do so
    side by side (https://github.com/python/cpython/issues/106905). Here it is compared with the head expected.

    Raises OSError if the file cannot be read, ValueError if it holds something else, or not the whole of it.
    """
    with file.open("rb") as stream:
        start = stream.read(_START)
        text = stream.read(int.from_bytes(start[8:], "little"))
        size = stream.seek(0, io.SEEK_END)
    if shape is None:
        sizes = re.search(rb"'shape': \(([\d, ]*)\)", text)
        shape = tuple(int(n) for n in sizes[1].split(b",") if n.strip()) if sizes else ()
    expected = head(dtype, shape)
    # NumPy fills heads up with spaces, in earlier versions with fewer.
    found, wanted = (part.strip().decode("latin1") for part in (text, expected[_START:]))
    if start[:8] != expected[:8] or found != wanted:
        raise ValueError(f"{found or 'no array'} instead of {wanted}")
    begins = _START + len(text)
    if size != begins + math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{size} bytes, which are not those of {found}")
    return np.memmap(file, dtype, "r", begins, shape)
