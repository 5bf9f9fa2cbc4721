"""Start several processes on this machine: what torchrun does, with one line for the user where it ends.

Needs neither torch nor a rendezvous: the first process is where the others meet.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lingshu_cell.errors import LingshuError, LostProcessError

LAUNCHED = "LINGSHU_LAUNCHED"
"""Set in the environment of the processes: who started them says what became of them."""

LOST_REMEDY = "The last checkpoint, if there is one, is whole: go on with --resume and any number of processes"

_ENDING_SECONDS, _GRACE_SECONDS = 5.0, 30.0  # after one ended badly: until the others are asked to end, and made to
_POLL_SECONDS = 0.05


_told: list[str] | None = None


def remember(arguments: Sequence[str] | None) -> None:
    """Keep the arguments of the command line that runs, where they are not those of the process."""
    global _told
    _told = None if arguments is None else list(arguments)


def command_line() -> list[str]:
    """Give the arguments of the command line that runs, for the processes that it is divided among."""
    return sys.argv[1:] if _told is None else list(_told)


def is_launched() -> bool:
    """Whether this process is one of several already, started by :func:`launch` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that reports: the first of several, or alone."""
    return os.environ.get("RANK", "0") == "0"


def launch(arguments: Sequence[str], n_processes: int) -> int:
    """Run the command line in several processes and wait for all of them.

    Parameters
    ----------
    arguments
        Of the command ``lingshu``.
    n_processes
        How many.

    Returns
    -------
    int
        The exit code: that of the first process that did not end well, which has said why.

    Raises
    ------
    LostProcessError
        If a process was killed.
    KeyboardInterrupt
        If processes were killed because somebody asked twice to stop.
    """
    with _signals_passed_on() as running:
        running.start(arguments, n_processes)
        code = running.wait()
    if code < 0 and running.asked:
        raise KeyboardInterrupt
    if code < 0:
        lost = next(i for i, process in enumerate(running.processes) if process.returncode == code)
        raise LostProcessError(
            "All processes must live to the end",
            f"process {lost} of {n_processes} was ended by {signal.Signals(-code).name}",
            LOST_REMEDY,
        )
    return code


def launch_apart(arguments: Sequence[str], n_processes: int) -> tuple[int, list[str]]:
    """Run the command line in several processes that do each other's work: one that ends early takes nothing along.

    Parameters
    ----------
    arguments
        Of the command ``lingshu``.
    n_processes
        How many.

    Returns
    -------
    tuple
        The exit code, 0 if one process did its work to the end, and what to tell of those that did not.

    Raises
    ------
    LostProcessError
        If all processes were killed.
    """
    with _signals_passed_on() as running:
        running.start(arguments, n_processes)
        running.wait(together=False)
        codes = [process.returncode for process in running.processes]
    ended = [
        f"process {i} of {n_processes} ended early ({_how(code)}); the others did its work"
        for i, code in enumerate(codes)
        if code
    ]
    if 0 in codes:
        return 0, ended
    said = [code for code in codes if code > 0]
    if said:
        return said[0], []
    if running.asked:
        raise KeyboardInterrupt
    raise LostProcessError(
        "One process must live to the end",
        f"all {n_processes} were ended, the first by {_how(codes[0])}",
        "What they finished is kept: give the same command again",
    )


def meeting_port() -> int:
    """Find a free port of this machine where processes can meet.

    It is none of those that the system gives to connections: a process that asks for the meeting before it is open
    could be given that very port for its end, and meet itself.

    Returns
    -------
    int
        The port, 10,000 or more; not the same one twice in a row, but by chance.
    """
    try:
        first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first_given = 32768  # Linux's own; macOS and Windows begin at 49,152
    ports = range(10_000, first_given if first_given > 11_000 else 32768)
    for port in random.sample(ports, 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise LingshuError(
        "Processes need a port to meet at",
        f"100 tries between {ports[0]} and {ports[-1]} were taken",
        "Start them with torchrun, which lets you choose one (--master-port)",
    )


def _how(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _environment(rank: int, n_processes: int, port: int) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // n_processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # without stacks of C++ where a process meets another's end
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: "1",
    }


class _Running:
    """The processes, and what is done when one of them ends or somebody asks all to stop."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked = 0
        self.port = meeting_port()

    def start(self, arguments: Sequence[str], n_processes: int) -> None:
        """Start them."""
        for rank in range(n_processes):
            environment = _environment(rank, n_processes, self.port)
            command = [sys.executable, "-m", "lingshu_cell", *arguments]
            # Ctrl-C waits until they can hear it: Python itself, as it starts, would answer with a traceback
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:  # a session of their own: Ctrl-C at the terminal reaches them once, through this process
                self.processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, number: int, frame: object) -> None:
        """Pass a signal on; the second time, kill."""
        self.asked += 1
        self.tell(signal.Signals(number) if self.asked == 1 else signal.SIGKILL)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to all that run."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def wait(self, together: bool = True) -> int:
        """Wait for all; where they work together, once one has ended badly the others have some time left. Gives the
        first bad exit code.
        """
        first_bad, ends = 0, []
        while True:
            codes = [process.poll() for process in self.processes]
            bad = [code for code in codes if code]
            if bad and not first_bad and together:
                first_bad = min(bad)  # a killed process explains what the others met
                now = time.monotonic()
                ends = [(now + _ENDING_SECONDS, signal.SIGTERM), (now + _GRACE_SECONDS, signal.SIGKILL)]
            if None not in codes:
                return first_bad
            if ends and time.monotonic() > ends[0][0]:
                self.tell(ends.pop(0)[1])
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[_Running]:
    """Give the processes every Ctrl-C and SIGTERM that comes here, while the block runs."""
    running = _Running()
    before = {number: signal.signal(number, running.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        running.tell(signal.SIGKILL)
