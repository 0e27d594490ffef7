"""The examples in the docstrings of the public modules run and print what they say."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import lowrank_kernels
from lowrank_kernels.files import MissingExtra


def public_modules() -> Iterator[ModuleType]:
    yield lowrank_kernels
    for found in pkgutil.walk_packages(lowrank_kernels.__path__, "lowrank_kernels."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        try:
            yield importlib.import_module(found.name)
        except MissingExtra:
            continue
        except ModuleNotFoundError as error:  # an extra that is not installed
            if (error.name or "").startswith("lowrank_kernels"):
                raise


EXAMPLES = {test.name: test for module in public_modules() for test in doctest.DocTestFinder().find(module) if test.examples}


def test_the_examples_are_found() -> None:
    assert {"lowrank_kernels.entries.ObservedEntries", "lowrank_kernels.ops.completion.completion_loss"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(EXAMPLES[name], out=said.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(said)
