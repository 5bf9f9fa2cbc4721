"""Run something in a fork of the test, to be killed or starved there."""

import os
import signal
from collections.abc import Callable
from typing import Any

from lingshu_cell.errors import LingshuError


def in_child(action: Callable[[], Any]) -> int:
    """Run something in a fork; exit code 0, 2 for a LingshuError or OSError (told on stderr), 1, or minus the signal.

    A fork has the thread that forked only: what waits for another thread of its parent (a pool of OpenMP, say) waits
    for ever, so the fork goes when the time of its test is over.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            action()
            code = 0
        except (LingshuError, OSError) as error:
            os.write(2, f"{error}\n".encode())
            code = 2
        finally:
            os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
