"""Whether the processes of a distributed run hold the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Fingerprint(NamedTuple):
    """What processes with the same data agree on.

    Attributes:
        n_samples: how many samples there are, where that is known.
        first: a digest of the first sample; None where a dataset gives another one every time.
    """

    n_samples: int | None
    first: str | None


def digest_of(sample: Tensor) -> str:
    """A digest of the values of a sample."""
    return hashlib.sha256(sample.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def is_split(told: Sequence[Fingerprint]) -> bool:
    """Whether a stream is split among the processes, each of which has its own part.

    Args:
        told: the fingerprint of each process.

    Raises:
        ValueError: If they hold different data in another way.
    """
    numbers = [each.n_samples for each in told]
    digests = [each.first for each in told if each.first is not None]
    give = "give each of them the whole data, which `evaluate` divides."
    if len(set(numbers)) > 1:
        raise ValueError(
            f"Expected argument `data` to be the same on every process, but they have {numbers} samples: {give}"
        )
    if len(set(digests)) < 2:
        return False
    if numbers[0] is None and len(set(digests)) == len(told):
        return True
    raise ValueError(
        f"Expected argument `data` to be the same on every process, but their first samples differ: {give}"
    )
