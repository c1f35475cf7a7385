"""Long lists of cases: a part of them runs by default, the others with `pytest -m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def sparse(cases: Iterable[Any], every: int) -> list[Any]:
    """Mark all cases as slow, except the first of each `every` cases."""
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if i % every == 0 else pytest.mark.slow) for i, case in enumerate(listed)]
