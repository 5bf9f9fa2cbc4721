"""Kills, full disks, damaged files, missing rights and two processes at once, against every command that writes.

``python benchmarks/faults`` runs everything, ``--parts kills disks …`` some of it.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import campaign
from commands import make_commands
from forks import import_everything
from recording import ROOT, Stopwatch, environment, say, write_result

KEPT = ROOT / "build" / "faults"
ABOUT = (
    "What is left when the machine fails: commands ended at random moments and at chosen ones, disks that are full, "
    "files that are cut off or have a flipped bit, folders that may not be written, and two processes on one output. "
    "300 cells of PBMC 3k × 2,000 genes, some 900 × 600 of Kang's, networks of a few thousand parameters."
)


def main() -> None:
    """Run the parts asked for and write ``results/faults.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=campaign.PARTS, default=list(campaign.PARTS))
    parser.add_argument("--kills", type=int, default=150, help="processes to end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--reuse", action="store_true", help="take the parts that an earlier call finished from build/")
    parser.add_argument("--result", default="faults", help="name of the result; - writes none")
    options = parser.parse_args()
    facts, watch = environment(), Stopwatch()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would commands
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    import_everything()
    with tempfile.TemporaryDirectory(prefix="lingshu-faults-") as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        done = {part: KEPT / f"{part}.json" for part in options.parts if options.reuse}
        done = {part: json.loads(file.read_text()) for part, file in done.items() if file.is_file()}
        if left := [part for part in options.parts if part not in done]:
            commands = make_commands(work, options.only)
            say(f"{len(commands)} commands, set up in {watch.seconds():.0f} s")
            KEPT.mkdir(parents=True, exist_ok=True)
            progress = KEPT / "kills-so-far.json"
            if not options.reuse:
                progress.unlink(missing_ok=True)
            found = campaign.Campaign(Path(scratch), commands, options.seed, options.jobs, options.kills, progress)
            for part in found.run(left):
                part["problems"] = [one.replace(scratch, "…") for one in part["problems"]]
                done[part["part"]] = part
                (KEPT / f"{part['part']}.json").write_text(json.dumps(part))
    sections = [done[part]["section"] for part in options.parts]
    body = {part: done[part]["numbers"] for part in options.parts}
    body["problems"] = [one for part in options.parts for one in done[part]["problems"]]
    body["seconds"] = round(watch.seconds(), 1)
    problems = body["problems"]
    sections.append("## What went wrong\n\n" + ("\n".join(f"- {one}" for one in problems) or "Nothing."))
    if options.result != "-":
        write_result(options.result, ABOUT, facts, body, sections)
    else:
        print("\n\n".join(sections))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
