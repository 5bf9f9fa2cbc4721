"""How malformed inputs end: every named case of tests/malformed and random mutations of whole files, counted.

Each runs in a fork of one process that has imported everything, under limits of address space and time.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from recording import ROOT, Stopwatch, environment, markdown_table, say, write_result

sys.path.insert(0, str(ROOT / "tests"))

from malformed.catalogue import cases
from malformed.examples import write_examples
from malformed.harness import MOST_GROWTH_MIB, SECONDS, Case, Outcome, Worker
from malformed.mutations import KINDS, mutation

KEPT = ROOT / "build" / "malformed.jsonl"
_HEADER = ("input", "cases", "accepted", "refused", "mishandled", "longest, CPU s", "most memory, MiB")


def main() -> None:
    """Try all cases and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=40, help="random mutations of each kind of file")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the mutations")
    parser.add_argument("--reuse", action="store_true", help="try only what an earlier call did not, or found wrong")
    options = parser.parse_args()
    facts, watch = environment(), Stopwatch()
    random = [mutation(kind, options.seed + i) for kind in KINDS for i in range(options.mutations)]
    with tempfile.TemporaryDirectory() as scratch, Worker(write_examples(Path(scratch) / "examples")) as worker:
        known = _known() if options.reuse else {}
        found: dict[str, list[tuple[Case, Outcome]]] = defaultdict(list)
        KEPT.parent.mkdir(exist_ok=True)
        with open(KEPT, "a" if options.reuse else "w", encoding="utf-8") as kept:
            for number, case in enumerate([*cases().values(), *random]):
                outcome = known.get(case.name)
                if outcome is None or outcome.faults(case):
                    folder = Path(scratch) / str(number)
                    folder.mkdir()
                    outcome = worker.run(case.name, folder)
                    kept.write(json.dumps({"name": case.name, **asdict(outcome)}) + "\n")
                    kept.flush()
                    shutil.rmtree(folder, ignore_errors=True)
                if number % 100 == 0:
                    say(f"{number} …")
                found[case.kind].append((case, outcome))
                for fault in outcome.faults(case):
                    say(f"{case.name}: {fault}")
    rows = {kind: _row(pairs) for kind, pairs in found.items()}
    named = [pair for kind, pairs in found.items() if not kind.startswith("mutated ") for pair in pairs]
    mutations = [pair for kind, pairs in found.items() if kind.startswith("mutated ") for pair in pairs]
    totals = {"all named cases": _row(named), "all mutations": _row(mutations)}
    wrong = {case.name: outcome.faults(case) for case, outcome in [*named, *mutations] if outcome.faults(case)}
    table = [(name, *row.values()) for name, row in (*totals.items(), *rows.items())]
    about = (
        "Malformed inputs of every kind. Refused: exit code 2 and one line; accepted: the input is odd but right; "
        f"mishandled: a traceback, another exit code, more than {SECONDS:.0f} CPU seconds, {MOST_GROWTH_MIB:.0f} MiB "
        "beyond the start, code in the input executed, control characters printed, or refused where it had to be "
        "accepted and the other way round. Of mutations either end is right. "
        f"Random mutations have the seeds {options.seed} to {options.seed + options.mutations - 1}."
    )
    body = {"totals": totals, "kinds": rows, "mishandled": wrong, "seconds": watch.seconds()}
    mishandled = "\n".join(f"- {name}: {', '.join(faults)}" for name, faults in wrong.items())
    write_result("malformed", about, facts, body, [markdown_table(_HEADER, table), *([mishandled] if wrong else [])])


def _known() -> dict[str, Outcome]:
    """Give what an earlier call found."""
    if not KEPT.is_file():
        return {}
    lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    return {line.pop("name"): Outcome(**line) for line in lines}


def _row(pairs: list[tuple[Case, Outcome]]) -> dict[str, float]:
    wrong = [bool(outcome.faults(case)) for case, outcome in pairs]
    ends = [None if bad else outcome.code for bad, (_, outcome) in zip(wrong, pairs, strict=True)]
    return {
        "cases": len(pairs),
        "accepted": ends.count(0),
        "refused": ends.count(2),
        "mishandled": sum(wrong),
        "seconds": max(outcome.seconds for _, outcome in pairs),
        "memory_mib": max(outcome.growth_mib for _, outcome in pairs),
    }


if __name__ == "__main__":
    main()
