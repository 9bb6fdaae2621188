import warnings

import datasets
import pytest
import torch
import transformers
from hypothesis import settings

import late_writer  # noqa: F401 - registers a third party's method, so that the laws cover one

# The same examples at each run, however long one takes; `--hypothesis-profile thorough` looks at many others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=3000)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Same seed for every test."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    # models of a test's size take a hundred times longer where threads wait for each other
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("default")
