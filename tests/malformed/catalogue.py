"""All named cases, and random mutations of whole files under names such as ``mutation:h5ad:17``."""

from functools import cache
from importlib import import_module

from malformed.harness import Case

MODULES = ("counts_cases", "file_cases", "settings_cases", "table_cases", "folder_cases")


@cache
def cases() -> dict[str, Case]:
    """Name → case, in order."""
    found: dict[str, Case] = {}
    for module in MODULES:
        for case in import_module(f"malformed.{module}").CASES:
            assert case.name not in found, f"{case.name} comes twice"
            found[case.name] = case
    return found


def find(name: str) -> Case:
    """Give a case by its name; the worker has nothing but names."""
    if name.startswith("mutation:"):
        from malformed.mutations import mutation

        _, kind, seed = name.split(":")
        return mutation(kind, int(seed))
    return cases()[name]


class Collector(list):
    """The cases of one module; a decorator puts a function among them."""

    def __call__(self, kind: str, what: str, expected: str, says: str = ""):
        def add(make):
            self.append(Case(f"{kind}: {what}", kind, expected, make, says))
            return make

        return add
