"""HDF5 files on disks that may be full: the first error of writing is raised once, as Python raises its own."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

from lingshu_cell.interruption import deferred_signals


class Hdf5Output:
    """An HDF5 file open for writing, as ``file``; it is written under :meth:`told_once`.

    HDF5 itself, when it cannot write, raises again and again while it gives up its caches, prints tracebacks as its
    objects are collected, and cannot close the file. So it writes through a Python file that keeps the first error for
    us and lets it believe that all is well; what it wrote is whole only if :meth:`close` says nothing. While HDF5 is at
    work, Ctrl-C and SIGTERM wait: raised in that Python file, they would end in a segmentation fault.

    Parameters
    ----------
    path
        The file; overwritten.
    layout
        Of :class:`h5py.File`, e.g. ``alignment_threshold``.
    """

    def __init__(self, path: Path, **layout: Any) -> None:
        self._sink = _Sink(path)
        with deferred_signals():
            self.file = h5py.File(self._sink, "w", **layout)

    @contextmanager
    def told_once(self) -> Iterator[h5py.File]:
        """Write while the block runs; the first error of writing is raised at its end.

        Raises
        ------
        OSError
            As the system gave it, in place of what HDF5 made of it.
        """
        try:
            with deferred_signals():
                yield self.file
        finally:
            if self._sink.error is not None:
                raise self._sink.error

    def close(self) -> None:
        """Write all that is left and close the file.

        Raises
        ------
        OSError
            If it is not whole.
        """
        with self.told_once():
            self.file.close()
            self._sink.close()

    def abandon(self) -> None:
        """Close the file, whatever is missing in it."""
        self._sink.error = self._sink.error or OSError("abandoned")  # nothing more is written
        with deferred_signals():
            with suppress(Exception):  # it reads back what was never written
                self.file.close()
            self._sink.close()


@contextmanager
def writing_hdf5(path: Path, **layout: Any) -> Iterator[h5py.File]:
    """Write an HDF5 file while the block runs.

    Parameters
    ----------
    path, layout
        See :class:`Hdf5Output`.

    Raises
    ------
    OSError
        If the file is not whole.
    """
    output = Hdf5Output(path, **layout)
    try:
        with output.told_once() as file:
            yield file
        output.close()
    except BaseException:
        output.abandon()
        raise


class _Sink(io.FileIO):
    """A file that keeps the first error of writing; what comes after it goes into memory, where HDF5 can read it back.

    That is little, as whoever writes learns of the error soon: the rest of what was handed over, and caches.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []
        super().__init__(path, "w+")

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        n_bytes = len(left)
        try:
            while self.error is None and len(left):
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        if len(left):
            self._unwritten.append((self.tell(), bytes(left)))
            self.seek(len(left), io.SEEK_CUR)
        return n_bytes

    def readinto(self, buffer: Any) -> int:
        if self.error is None:
            return super().readinto(buffer)
        into, start = memoryview(buffer).cast("B"), self.tell()
        n_read = super().readinto(into)
        into[n_read:] = bytes(len(into) - n_read)
        for at, data in self._unwritten:
            first, end = max(at, start), min(at + len(data), start + len(into))
            if first < end:
                into[first - start : end - start] = data[first - at : end - at]
        self.seek(start + len(into))
        return len(into)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._unwritten:
            end = max(at + len(data) for at, data in self._unwritten)
            return super().seek(max(end, super().seek(0, io.SEEK_END)) + offset)
        return super().seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.error = error
        return size or 0
