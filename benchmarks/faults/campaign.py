"""All parts of the campaign: each disturbs every command its way and holds what is left against an undisturbed run."""

import json
import os
import pickle
import shutil
import signal
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import damage
import disks
import numpy as np
from commands import Command, by_weight, contents, differing, half_written
from forks import Disturbance, fork, started, whole_process, without_privileges
from recording import markdown_table, say

PARTS = ("order", "kills", "disks", "damage", "rights", "twice")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_WHOLE_PROCESSES = 8  # one in so many trials
_MOST_IN_A_ROW = 3
_STOPPED_CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, 130), signal.SIGINT: (130,)}
_SLOW = 15.0  # seconds of a command from which on it is tried less often
_START_SECONDS = 1.0  # until Python and the command line are there and answer signals in their own words


@dataclass(frozen=True)
class Undisturbed:
    """What a command does when nothing goes wrong."""

    seconds: float
    events: list[list[str]]
    before: dict[str, str]
    after: dict[str, str]


@dataclass
class Campaign:
    """The commands, and where trials take place; ``progress`` keeps kills from call to call."""

    scratch: Path
    commands: Sequence[Command]
    seed: int
    jobs: int
    n_kills: int
    progress: Path | None = None
    undisturbed: dict[str, Undisturbed] = field(default_factory=dict)

    def run(self, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Run parts; give for each its numbers, what went wrong, and its section of the page."""
        for command in self.commands:
            known = self.undisturbed[command.name] = self._undisturbed(command)
            say(f"{command.name}: {known.seconds:.1f} s, {len(known.events)} events")
        for part in parts:
            begun = time.monotonic()
            numbers, problems, section = getattr(self, f"_{part}")()
            seconds = round(time.monotonic() - begun, 1)
            say(f"{part}: {len(problems)} problems, {seconds:.0f} s")
            for one in problems:
                say(f"  {one}")
            yield {
                "part": part,
                "numbers": {**numbers, "seconds": seconds, "n_problems": len(problems)},
                "problems": [f"{part}: {one}" for one in problems],
                "section": section,
            }

    @property
    def alone(self) -> list[Command]:
        """Commands of one process."""
        return [command for command in self.commands if command.processes == 1]

    def place(self, name: str) -> Path:
        """Make a folder for a trial."""
        folder = self.scratch / f"{name.replace(', ', '-').replace(' ', '-')}-{time.monotonic_ns()}"
        folder.mkdir()
        return folder

    def _undisturbed(self, command: Command) -> Undisturbed:
        folder = self.place(command.name)
        command.begin(folder)
        before, size = contents(folder), disks.size_of(folder)
        record = folder.with_suffix(".json")
        ended = fork(_alone(command.words), folder, record=record)
        if not ended.code and command.processes > 1:  # what it writes is the same, but for rounding
            shutil.rmtree(folder)
            folder.mkdir()
            command.begin(folder)
            ended = whole_process(command.words, folder)
        if ended.code:
            raise SystemExit(f"{command.name} fails undisturbed: {ended.err[-2000:]}")
        found = Undisturbed(ended.seconds, json.loads(record.read_text()), before, contents(folder))
        disks.remember_sizes(command, folder, size)
        shutil.rmtree(folder)
        return found

    def _each(self, trial: Callable[..., Any], tasks: Iterable[tuple]) -> list[Any]:
        """Run trials, some at once, in forks of this process; give their results in order."""
        tasks = list(tasks)
        files = [self.scratch / f"results-{time.monotonic_ns()}-{job}" for job in range(self.jobs)]
        workers = []
        for job, file in enumerate(files):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    file.write_bytes(pickle.dumps([trial(*task) for task in tasks[job :: self.jobs]]))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            workers.append(pid)
        for pid in workers:
            if os.waitpid(pid, 0)[1]:
                raise RuntimeError("a trial of the harness itself failed")
        results: list[Any] = [None] * len(tasks)
        for job, file in enumerate(files):
            results[job :: self.jobs] = pickle.loads(file.read_bytes())
            file.unlink()
        return results

    # --- flushed before renamed -------------------------------------------------------------------------------------

    def _order(self) -> tuple[dict, list[str], str]:
        """Hold the recorded order of renames and flushes against what a power cut asks for."""
        problems, rows = [], []
        for command in self.alone:
            known = self.undisturbed[command.name]
            found = order_problems(known.events, known.before, known.after)
            counts = Counter(kind for kind, *_ in known.events)
            rows.append((command.name, counts["rename"], counts["flush"], len(found)))
            problems += [f"{command.name}: {one}" for one in found]
        table = markdown_table(("command", "renames", "flushes", "out of order"), rows)
        text = (
            "## Flushed before renamed\n\nEvery file that gets its final name was flushed to the disk since it was "
            "last written, its folder is flushed afterwards, and before anything older is removed; no file is written "
            "under its final name but the growing log `history.csv`.\n\n" + table
        )
        return {"rows": rows}, problems, text

    # --- kills ------------------------------------------------------------------------------------------------------

    def _kills(self) -> tuple[dict, list[str], str]:
        counts: dict[str, Counter] = defaultdict(Counter)
        problems: list[str] = []
        rounds = 0
        if self.progress is not None and self.progress.is_file():
            known = json.loads(self.progress.read_text(encoding="utf-8"))
            counts |= {name: Counter(one) for name, one in known["counts"].items()}
            problems, rounds = known["problems"], known["rounds"]
        total = sum(sum(one.values()) for one in counts.values())
        deck = by_weight(self.commands, 100 * self.n_kills)
        while total < self.n_kills:
            rng = np.random.default_rng([self.seed, rounds])
            chosen = deck[rounds * _WHOLE_PROCESSES : (rounds + 1) * _WHOLE_PROCESSES]
            trials = [(command, int(rng.integers(2**31)), i == 0) for i, command in enumerate(chosen)]
            for name, kills, found in self._each(self._kill_trial, trials):
                counts[name].update(kills)
                total += sum(kills.values())
                problems += found
            rounds += 1
            if self.progress is not None:
                state = {"counts": counts, "problems": problems, "rounds": rounds}
                self.progress.write_text(json.dumps(state), encoding="utf-8")
            say(f"{total} of {self.n_kills} kills, {len(problems)} problems")
        names = sorted({kind for one in counts.values() for kind in one})
        rows = [(name, sum(one.values()), *(one[kind] for kind in names)) for name, one in sorted(counts.items())]
        rows.append(("all", total, *(sum(one[kind] for one in counts.values()) for kind in names)))
        text = (
            f"## {total} kills\n\nUp to {_MOST_IN_A_ROW} in a row, then the command once more as a user gives it "
            "(`train` with `--resume` once there is a checkpoint). *random*: after a random time; *targeted*: right "
            "before a chosen write, rename, removal or flush. After each kill no file with a final name may be "
            "half-written; at the end every file must be, bit for bit, what an undisturbed command writes (wall times "
            "aside), and nothing else may be there. "
            f"One in {_WHOLE_PROCESSES} is a whole process, the others forks of one that has imported everything; "
            "training with two processes always is whole, and the signal goes to the command, to one of its two "
            "processes, or comes in the one that writes.\n\n" + markdown_table(("command", "kills", *names), rows)
        )
        return {"n": total, "by_command": {k: dict(v) for k, v in counts.items()}}, problems, text

    def _kill_trial(self, command: Command, seed: int, whole: bool) -> tuple[str, Counter, list[str]]:
        rng, known, folder = np.random.default_rng(seed), self.undisturbed[command.name], self.place(command.name)
        command.begin(folder)
        kills, problems = Counter(), []
        whole = whole or command.processes > 1
        run = whole_process if whole else fork
        slower = 4.0 if whole and command.processes == 1 else 1.2  # Python's start and imports come on top
        for _ in range(int(rng.integers(1, _MOST_IN_A_ROW + 1))):
            number = SIGNALS[rng.integers(len(SIGNALS))]
            targeted = bool(rng.random() < 0.5)
            if targeted:
                disturbance = Disturbance(number, at=int(rng.integers(1, len(known.events) + 1)))
            else:
                disturbance = Disturbance(number, after=float(rng.uniform(0, slower * known.seconds)))
            which = {}
            if command.processes > 1 and not targeted and rng.random() < 0.5:
                which = {"in_child": float(rng.uniform(1e-9, 1))}
            ended = run(command.again(folder), folder, disturbance, **which)
            where = f"{command.name}, {'whole process, ' if whole else ''}{disturbance}{', a child' if which else ''}"
            if ended.code == 0:
                break  # it was done before
            early = not targeted and disturbance.after < (_START_SECONDS if whole else _START_SECONDS / 10)
            if ended.code == 2 and "exist" in ended.err:
                break  # the one before had given the output its name
            one_of_several = command.processes > 1 and (targeted or which)
            codes = (*_STOPPED_CODES[number], *((-number, 1, 130) if early else ()), *((1,) if one_of_several else ()))
            if ended.code not in codes:
                problems.append(f"{where}: exit code {ended.code}: {ended.err[-400:]}")
            if not early and "Traceback" in ended.err:
                problems.append(f"{where}: traceback: {ended.err[-400:]}")
            kills[f"{number.name}, {'targeted' if targeted else 'random'}"] += 1
            if rest := half_written(folder, known.after, known.before.values()):
                problems.append(f"{where}: {rest}")
        ended = (fork if command.processes == 1 else whole_process)(command.again(folder), folder)
        finished = ended.code == 2 and "exist" in ended.err and (folder / command.out).is_file()
        if ended.code and not finished:
            problems.append(f"{command.name}, seed {seed}: does not go on: {ended.err[-400:]}")
        if others := differing(contents(folder), known.after):
            problems.append(f"{command.name}, seed {seed}: {others[:6]}")
        shutil.rmtree(folder)
        return command.name, kills, problems

    # --- full disks -------------------------------------------------------------------------------------------------

    def _disks(self) -> tuple[dict, list[str], str]:
        def shares(command: Command) -> tuple[float, ...]:
            quick = self.undisturbed[command.name].seconds < _SLOW
            return (0.02, 0.2, 0.5, 0.8, 0.97) if quick else (0.1, 0.8)

        ways = ("tmpfs", "limit") if disks.can_mount(self.scratch) else ("limit",)
        tasks = [(c, share, way) for c in self.commands for share in shares(c) for way in ways]
        outcomes: dict[str, Counter] = defaultdict(Counter)
        problems: list[str] = []
        for name, outcome, found in self._each(self._disk_trial, tasks):
            outcomes[name][outcome] += 1
            problems += found
        outcome, found = disks.full_stdout(self.scratch)
        problems += found
        rows = [(name, sum(one.values()), one["refused"], one["enough"]) for name, one in outcomes.items()]
        text = (
            "## Full disks\n\nA small file system "
            f"({'tmpfs' if 'tmpfs' in ways else 'not possible here'}) and a limit on the size of files, each at "
            "2 % to 97 % of what the command needs. *refused*: exit code 2, one line, "
            "what was there before is whole; with room again the same command ends as an undisturbed one. "
            f"`lingshu config > /dev/full`: {outcome}.\n\n"
            + markdown_table(("command", "trials", "refused", "enough"), rows)
        )
        return {"by_command": {k: dict(v) for k, v in outcomes.items()}, "stdout": outcome}, problems, text

    def _disk_trial(self, command: Command, share: float, way: str) -> tuple[str, str, list[str]]:
        return disks.trial(command, self.undisturbed[command.name], share, way, self.place(command.name))

    # --- damaged files ----------------------------------------------------------------------------------------------

    def _damage(self) -> tuple[dict, list[str], str]:
        return damage.run({c.name: c for c in self.commands}, self.place, self._each, self.seed)

    # --- no rights --------------------------------------------------------------------------------------------------

    def _rights(self) -> tuple[dict, list[str], str]:
        ways = ("mode", "read-only") if disks.can_mount(self.scratch) else ("mode",)
        results = self._each(self._right_trial, [(c, way) for c in self.alone for way in ways])
        problems = [one for _, found in results for one in found]
        counts = Counter(name for name, _ in results)
        text = (
            "## No rights\n\nThe output's folder with mode 0555 (root without its privileges), and on a read-only file "
            f"system ({'tmpfs' if len(ways) > 1 else 'not possible here'}): exit code 2, one line, nothing changed.\n\n"
            + markdown_table(("command", "refused"), list(counts.items()))
        )
        return {"n": len(results)}, problems, text

    def _right_trial(self, command: Command, way: str) -> tuple[str, list[str]]:
        return command.name, disks.without_rights(command, way, self.place(command.name), without_privileges)

    # --- two at once ------------------------------------------------------------------------------------------------

    def _twice(self) -> tuple[dict, list[str], str]:
        tasks = [
            (c, place)
            for c in self.alone
            if c.holds
            for place in ((0.3, 0.6, 0.9) if self.undisturbed[c.name].seconds < _SLOW else (0.6,))
        ]
        results = self._each(self._twice_trial, tasks)
        problems = [one for _, outcome, found in results for one in found]
        outcomes: dict[str, Counter] = defaultdict(Counter)
        for name, outcome, _ in results:
            outcomes[name][outcome] += 1
        rows = [(name, one["refused"], one["before its turn"], one["after it"]) for name, one in outcomes.items()]
        text = (
            "## Two at once\n\nThe first is stopped (SIGSTOP) before one of its writes while a second with the same "
            "words and output runs; then it goes on. *refused*: the second ended with code 2 and one line, and the "
            "first wrote what it writes alone. *before its turn*: the first held nothing yet, and was itself refused "
            "or found all done.\n\n" + markdown_table(("command", "refused", "before its turn", "after it"), rows)
        )
        return {"by_command": {k: dict(v) for k, v in outcomes.items()}}, problems, text

    def _twice_trial(self, command: Command, share: float) -> tuple[str, str, list[str]]:
        known, folder, problems = self.undisturbed[command.name], self.place(command.name), []
        command.begin(folder)
        at = max(1, round(share * len(known.events)))
        outcome = "refused"
        with started(command.words, folder, Disturbance(signal.SIGSTOP, at=at)) as first:
            if not first.wait_until_stopped():
                return command.name, "after it", [f"{command.name} was not stopped: {first.wait().err[-300:]}"]
            second = fork((*command.words, *command.overwrite), folder)
            os.kill(first.pid, signal.SIGCONT)
            ended = first.wait()
        if second.code == 0:
            outcome = "before its turn"
            if ended.code not in (0, 2):
                problems.append(
                    f"{command.name}: the first ended with {ended.code} after the second: {ended.err[-300:]}"
                )
        else:
            if wrong := second.refused_well():
                problems.append(f"{command.name}: the second: {wrong}")
            if ended.code:
                problems.append(f"{command.name}: the first was disturbed: {ended.err[-300:]}")
        if others := differing(contents(folder), known.after):
            problems.append(f"{command.name}, two at once, stopped at {at}: {others[:6]}")
        shutil.rmtree(folder)
        return command.name, outcome, problems


def _alone(words: Sequence[str]) -> list[str]:
    """Leave out that there are several processes."""
    words = list(words)
    if "--processes" in words:
        at = words.index("--processes")
        del words[at : at + 2]
    return words


def order_problems(events: Sequence[Sequence[str]], before: Iterable[str], after: Iterable[str]) -> list[str]:
    """Find what a power cut could tear apart in a recorded order of writes, flushes, renames and removals.

    Parameters
    ----------
    events
        Kind and paths each, as the hook gave them.
    before, after
        Files that were there when the command began and when it ended.
    """
    problems, named = [], set()
    dirty: set[str] = set()  # written since it was last flushed
    waiting: dict[str, str] = {}  # folder whose names are not on the disk → the last of them
    for kind, *paths in events:
        if kind == "write":
            dirty.add(paths[0])
        elif kind == "flush":
            dirty.discard(paths[0])
            waiting.pop(paths[0], None)
        elif kind == "rename":
            old, new = paths
            if torn := [path for path in dirty if (path + "/").startswith(old + "/") and not _is_rest(new)]:
                problems.append(f"{new} was renamed before {torn[0]} was flushed")
            dirty = {path for path in dirty if not (path + "/").startswith(old + "/")}
            named.add(new)
            if not _is_rest(new):
                waiting[str(Path(new).parent)] = new
        elif kind == "remove" and not _is_draft(paths[0]):
            parent = str(Path(paths[0]).parent)
            if parent in waiting:
                problems.append(f"{paths[0]} was removed before the name of {waiting[parent]} was on the disk")
    for name in sorted(set(after) - set(before)):
        is_named = any((name + "/").startswith(one + "/") for one in named)
        if not is_named and Path(name).name not in ("history.csv", "conditions.csv", ".lock"):
            problems.append(f"{name} was written under its final name")
    problems += [
        f"the name of {new} may not be on the disk at the end" for new in waiting.values() if not _is_draft(new)
    ]
    return problems


def _is_rest(path: str) -> bool:
    return Path(path).name.endswith(".old")


def _is_draft(path: str) -> bool:
    return any(part.startswith(".") or part.endswith(".tmp") for part in Path(path).parts)
