"""What holds a measure to its promise: checks to run on measures of your own.

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

from lightning_invariance.testing.feeding import LABELS, SAMPLES, assert_close, feed, update
from lightning_invariance.testing.measure_tester import MeasureTester

__all__ = ["LABELS", "SAMPLES", "MeasureTester", "assert_close", "feed", "update"]
