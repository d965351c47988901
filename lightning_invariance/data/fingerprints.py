"""Check that all processes measure equal data, and that transformations are deterministic and differ."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.messages import level_of_user
from lightning_invariance.model.outputs import plain
from lightning_invariance.random_state import Generator, isolated_random_state
from lightning_invariance.transforms import TransformationSet


class Fingerprint(NamedTuple):
    """Summary of the data of a process, equal on all processes that have equal data.

    Attributes:
        n_samples: number of samples; None for a stream.
        first: a digest of the first sample; None where a dataset is random.
    """

    n_samples: int | None
    first: str | None


def fingerprint_of(
    n_samples: int | None, first: Callable[[], Tensor | None], seed: int, own: Sequence[Generator]
) -> Fingerprint:
    """Make the fingerprint of data, given a function that loads the first sample, and generators of the data's own."""
    digests = set()
    for _ in range(2):
        with isolated_random_state(seed, own):
            found = first()
        if found is None:
            return Fingerprint(n_samples, None)
        values = plain(found).detach().cpu().contiguous().view(torch.uint8)  # numpy has no bfloat16
        digests.add(hashlib.sha256(values.numpy().tobytes()).hexdigest())
    return Fingerprint(n_samples, digests.pop() if len(digests) == 1 else None)


def keys_of(samples: Tensor) -> Tensor:
    """Compute a 64-bit hash of the content of each sample, ``(n,)``; floating-point samples count in float32."""
    samples = plain(samples)
    samples = samples.float() if samples.is_floating_point() else samples
    values = samples.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in values)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.long)


def warn_of_randomness(transformations: TransformationSet, sample: Tensor, seed: int) -> None:
    """Warn of transformations that draw random numbers: values depend on batches and processes."""
    with isolated_random_state(seed):
        is_random = transformations.is_random(sample)
    if is_random:
        warnings.warn(
            f"{transformations!r} transforms at random: the values depend on the batch size and on the number of"
            " processes. Write `TransformationSet.from_callables(..., seed=0)`, which draws for each sample, always the"
            " same; for Gaussian noise `noise(std=[0, 0.05, 0.1])`.",
            UserWarning,
            stacklevel=level_of_user(),
        )


def warn_of_equal(transformations: TransformationSet, inputs: Tensor) -> None:
    """Warn if all columns of inputs ``(rows, columns, ...)`` are equal, unless the inputs are constant."""
    inputs = plain(inputs)
    varies = bool((inputs != inputs.flatten()[0]).any())  # transformations do not change a constant image
    if inputs.shape[1] > 1 and varies and bool((inputs == inputs[:, :1]).all()):
        warnings.warn(
            f"All transformations of {transformations!r} give equal outputs, so that every layer looks invariant."
            " Functions made in a loop all see its last value: write `lambda x, k=k: ...`.",
            UserWarning,
            stacklevel=level_of_user(),
        )


def is_split(fingerprints: Sequence[Fingerprint]) -> bool:
    """Return whether each process has its own part of a stream, instead of equal data.

    Raises:
        ValueError: If the processes have different datasets, or some of them equal streams and others not.
    """
    numbers = [each.n_samples for each in fingerprints]
    digests = [each.first for each in fingerprints if each.first is not None]
    give = "give each of them the whole data, which `evaluate` divides."
    if len(set(numbers)) > 1:
        raise ValueError(
            f"Expected argument `data` to be the same on every process, but they have {numbers} samples: {give}"
        )
    if len(set(digests)) < 2:
        return False
    if numbers[0] is None and len(set(digests)) == len(fingerprints):
        return True
    raise ValueError(
        f"Expected argument `data` to be the same on every process, but their first samples differ: {give}"
    )
