"""Assertions for your own tests: of models, and of measures.

:func:`assert_invariant` and :func:`assert_equivariant` test a model, :class:`MeasureTester` tests a measure:

```python
from lightning_invariance.testing import MeasureTester

class TestNormalizedRange(MeasureTester):
    def make(self):
        return NormalizedRange()

    def definition(self, st):  # the value for a whole ST tensor, in float64
        ...
```

pytest runs all checks of such a class; they are plain methods and also work without pytest.
"""

from lightning_invariance.testing.assertions import assert_equivariant, assert_invariant
from lightning_invariance.testing.feeding import LABELS, SAMPLES, assert_close, feed, update
from lightning_invariance.testing.measure_tester import MeasureTester

__all__ = [
    "LABELS",
    "SAMPLES",
    "MeasureTester",
    "assert_close",
    "assert_equivariant",
    "assert_invariant",
    "feed",
    "update",
]
