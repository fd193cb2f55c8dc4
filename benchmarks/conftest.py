"""The option of ``pytest benchmarks`` that asks for the large shapes."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all-shapes``."""
    parser.addoption("--all-shapes", action="store_true", help="the shapes of 'python -m benchmarks', not small ones")
