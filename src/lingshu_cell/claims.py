"""Claims on numbered pieces of work, which processes on any machines share: each held by one, freed by its end.

A claim is a lock on one byte of a file (POSIX ``fcntl``), so there is nothing to clean up: the kernel, or the server of
a network file system, frees the claims of a process however it ends. A file system without such locks lets everybody
claim everything, so what is done under a claim must be the same when it is done twice.
"""

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Claims:
    """Claims of this process in a file; as a context manager it frees them all at the end.

    Parameters
    ----------
    file
        The file, made where it is absent; it stays empty. A process opens it once: closing any copy frees all claims.
    """

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int) -> bool:
        """Claim a piece; False if another process holds it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def free(self, number: int) -> None:
        """Give a piece up."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
