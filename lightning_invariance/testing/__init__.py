"""For tests of your own: is a model as invariant as it should be, and does a measure keep its promise?

:func:`assert_invariant` and :func:`assert_equivariant` are for models, :class:`MeasureTester` is for measures:

```python
from lightning_invariance.testing import MeasureTester

class TestNormalizedRange(MeasureTester):
    def make(self):
        return NormalizedRange()

    def definition(self, st):  # the value of a whole ST tensor, in float64
        ...
```

pytest runs all checks of such a class; they are plain methods, and need no pytest.
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
