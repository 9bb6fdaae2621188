import gc
import sys
import warnings

import datasets
import pytest
import torch
import transformers
from hypothesis import settings

import late_writer  # noqa: F401 - registers a third party's method, so that the laws cover one

FROZEN = pytest.StashKey[int]()
"""How many modules there were when all objects were last taken out of the collector's sight."""

# The same examples at each run, however long one takes; `--hypothesis-profile thorough` looks at many others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=3000)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Same seed for every test."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-laws", action="store_true", help="run the costly laws on every family (make laws-all)")
    parser.addoption("--engine", choices=("uvicorn", "ray"), default="uvicorn", help="of the server in tests/serve")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all-laws"):
        return
    left_out = {item for item in items if item.get_closest_marker("all_laws")}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    _freeze(session.config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if len(sys.modules) > item.config.stash[FROZEN] + 100:  # transformers imports much when it is first asked
        _freeze(item.config)


def _freeze(config: pytest.Config) -> None:
    # The Trainer collects garbage several times a run. Libraries and tests are none, and to look through them takes
    # seconds each time.
    gc.collect()
    gc.freeze()
    config.stash[FROZEN] = len(sys.modules)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries tidy up at the end


def pytest_configure(config: pytest.Config) -> None:
    # models of a test's size take a hundred times longer where threads wait for each other
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("default")
