"""Puzzles that ask for a Triton kernel can only be marked where triton is."""

import pytest

from minirlhf.checks.kernels import KernelExercise, why_not


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if why_not() and any(isinstance(x, KernelExercise) for x in parameters):
            item.add_marker(pytest.mark.skip(reason=why_not()))
