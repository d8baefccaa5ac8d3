"""Arrays of an .npz file, mapped where they are stored as they are, and never unpickled."""

import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

__all__ = ["NpzError", "NpzReader"]

Array = npt.NDArray[Any]

# What zipfile, zlib and numpy raise on a file that is cut short, altered or of another kind.
DAMAGE = (
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
LOCAL_HEADER = struct.Struct("<26xHH")
BLOCK_BYTES = 1 << 20
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NpzError(ValueError):
    """A file that is not a whole .npz, or holds no such array."""


class NpzReader:
    """The arrays of one .npz file, by name; use as a context manager.

    An array that is stored uncompressed, as ``np.savez`` does, is mapped: its bytes stay in the
    file until they are used. One that is compressed, as ``np.savez_compressed`` does, is unpacked
    into memory. Either way the checksum of all its bytes is compared first, a block at a time.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        NpzError: if it is no whole .npz file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file and read its table of contents.

        Raises:
            FileNotFoundError: if there is no such file.
            NpzError: if it is no whole .npz file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder, not a file" if self.path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{self.path} {what}")
        try:
            self._archive = zipfile.ZipFile(self.path)
        except DAMAGE as error:
            raise NpzError(f"it cannot be opened as a whole .npz file ({error})") from error

    def __enter__(self) -> "NpzReader":
        """Return the reader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; arrays already read stay valid."""
        self._archive.close()

    @property
    def keys(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def read(self, key: str) -> Array:
        """Return one array, read-only where it is mapped.

        Raises:
            NpzError: if it is not there, is empty or damaged, or holds Python objects.
        """
        if f"{key}.npy" not in self._archive.namelist():
            raise NpzError(f"it has no array {key!r}, only {', '.join(self.keys) or 'none at all'}")
        info = self._archive.getinfo(f"{key}.npy")
        try:
            return self._map(info) if info.compress_type == zipfile.ZIP_STORED else self._load(info)
        except DAMAGE as error:
            raise NpzError(f"its array {key!r} cannot be read: {error}") from error

    def _load(self, info: zipfile.ZipInfo) -> Array:
        member = io.BytesIO(self._archive.read(info))
        layout = _layout(member, info.file_size)
        return np.ndarray(buffer=member.getbuffer(), **layout)

    def _map(self, info: zipfile.ZipInfo) -> Array:
        with self._archive.open(info) as member:
            # The checksum is compared when the last byte has been read.
            while member.read(BLOCK_BYTES):
                pass
        with self._archive.open(info) as member:
            layout = _layout(member, info.file_size)
        layout["offset"] += self._first_byte(info)
        return np.memmap(self.path, mode="r", **layout)

    def _first_byte(self, info: zipfile.ZipInfo) -> int:
        # The table of contents need not agree with the member's own header on the lengths of its
        # name and extra field, and the member's own are those that precede its bytes.
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        return info.header_offset + LOCAL_HEADER.size + name + extra


def _layout(member: BinaryIO | Any, size: int) -> dict[str, Any]:
    """Return what numpy needs to see an array in the bytes of a .npy file of ``size`` bytes.

    Raises:
        ValueError: if they are no array of plain numbers.
    """
    version = np.lib.format.read_magic(member)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the .npy format is for records, not for numbers")
    shape, fortran_order, dtype = HEADERS[version](member)
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, which would have to be unpickled; labels.astype(str), or "
            "features.astype(float), has none"
        )
    offset = member.tell()
    if 0 in shape or dtype.itemsize == 0:
        raise ValueError(f"it is empty: shape {shape} of {dtype}")
    if size - offset != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{size - offset} bytes are not an array of shape {shape} of {dtype}")
    order = "F" if fortran_order else "C"
    return {"shape": shape, "dtype": dtype, "offset": offset, "order": order}
