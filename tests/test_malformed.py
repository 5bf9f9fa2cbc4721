"""Whatever is wrong with an input, it ends in exit code 2 and one clear line, or is taken rightly: see malformed/."""

import itertools
from pathlib import Path

import pytest
from malformed.catalogue import cases
from malformed.examples import write_examples
from malformed.harness import ACCEPTED, Case, Worker

CASES = list(cases().values())
_FAST_STRIDE = 20


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(write_examples(tmp_path_factory.mktemp("examples") / "all")) as one:
        yield one


def fast() -> list[Case]:
    """Every twentieth case of those that are refused, which takes no training; a few that are accepted."""
    refused = [case for case in CASES if case.expected != ACCEPTED]
    accepted = [case for case in CASES if case.expected == ACCEPTED]
    return list(itertools.chain(refused[::_FAST_STRIDE], accepted[:: 4 * _FAST_STRIDE]))


def check(worker: Worker, case: Case, folder: Path) -> None:
    outcome = worker.run(case.name, folder)
    assert not outcome.faults(case), f"{case.name}: {outcome.faults(case)}\n{outcome.err[-2000:]}"


def test_there_are_hundreds_of_cases():
    assert len({case.name for case in CASES}) >= 200


@pytest.mark.parametrize("case", fast(), ids=lambda case: case.name[:80].encode("ascii", "replace").decode())
def test_malformed_input_is_handled(case, worker, tmp_path):
    check(worker, case, tmp_path)


@pytest.mark.slow
def test_every_case_is_handled(worker, tmp_path):
    wrong = []
    for number, case in enumerate(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = worker.run(case.name, folder)
        if faults := outcome.faults(case):
            wrong.append(f"{case.name}: {faults}")
    assert not wrong, "\n".join(wrong)
