"""The examples in the docstrings of the mathematics run and are true."""

import doctest
import importlib

import pytest

MODULES = (
    "minirlhf_kernels.reference",
    "minirlhf.kl",
    "minirlhf.losses",
    "minirlhf.returns",
)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example_that_is_true(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
    for key, item in vars(module).items():
        if not key.startswith("_") and callable(item) and getattr(item, "__module__", "") == name:
            assert ">>>" in (item.__doc__ or ""), f"{name}.{key}"
