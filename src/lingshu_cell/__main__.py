"""The program ``lingshu``, also as ``python -m lingshu_cell``: Ctrl-C is one line from the first moment on."""

import os
import signal

from lingshu_cell.errors import EXIT_CODE_INTERRUPTED


def main() -> None:
    """Import the command line, which takes half a second in which Ctrl-C would be a traceback, and run it."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a shell starts what runs in its background so
    if not is_ignored:
        signal.signal(signal.SIGINT, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by whoever started several of us
    from lingshu_cell import cli

    if not is_ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _stop(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by Ctrl-C\n")
    os._exit(EXIT_CODE_INTERRUPTED)


if __name__ == "__main__":
    main()
