"""The sums behind all measures of variance: squared deviations within the rows and columns of the ST matrix."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_invariance.functional.variance import aggregate_maps
from lightning_invariance.measures import kernels
from lightning_invariance.measures.base import Measure, States
from lightning_invariance.measures.spread import PlainSums, add_plain, channel_changes, exact_sums, holds_plain
from lightning_invariance.transforms import TransformationSet

#: Updates before which the references move to the means: often enough for the digits, rare enough for the time. Before
#: these it is also tried again whether the plain set takes rows.
MOVE_REFERENCES = frozenset(4**power for power in range(1, 16))

#: Updates after which the centres of the plain set move to the means. Where most values are equal the same number is
#: added again and again, and rounded the same way: about the mean it is small.
MOVE_CENTRES = frozenset(16**power for power in range(1, 8))

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")

#: The rule of updates that add nothing but squared deviations.
SQUARES_ALONE: frozenset[Hashable] = frozenset([("squared deviations", True)])

#: The states of the plain set, and those of the exact set.
PLAIN = ("plain_samples", "centres", "plain_moments", "plain_columns")
EXACT = ("exact_samples", "row_spread", "references", "squares", "sums")


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    For k activations and m transformations the states are two sets of sums:

    - of blocks whose sums float32 holds without losing digits, which is the rule: ``plain_moments``, and in float32
      ``centres`` and ``plain_columns``; (2 + 1 + m) k numbers, laid out as in ``PlainSums``.
    - of the other blocks, such as those of float64 activations, with columns that are constant or on another device:
      ``row_spread`` (k,): the sum over rows of their squared deviations from the row mean, ``references`` (m, k),
      ``squares`` (1, k) and ``sums`` (m, k); see ``ExactSums``. They keep a division by zero (SV = 0) apart from one by
      a small number.

    A set is empty as long as it is not needed: most layers hold (m + 3) k numbers. Where ``squared`` is false,
    ``row_spread`` is the sum of the rows' standard deviations, ``squares`` (m, k) is kept for each column, and the
    first set is not used.
    """

    plain_samples: Tensor
    centres: Tensor
    plain_moments: Tensor
    plain_columns: Tensor
    exact_samples: Tensor
    row_spread: Tensor
    references: Tensor
    squares: Tensor
    sums: Tensor
    changes: Tensor

    #: Whether the measure can tell what each transformation does.
    _responds: ClassVar[bool] = True

    def __init__(
        self, squared: bool = True, aggregate: str | None = None, response: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"Expected argument `aggregate` to be one of {AGGREGATES}, but got {aggregate!r}.")
        if not isinstance(response, bool) or (response and not (squared and self._responds)):
            raise ValueError(
                "Expected argument `response` to be a bool, true only for TransformationVariance and NormalizedVariance"
                f" with `squared=True`, but got {response!r}."
            )
        self.squared, self.aggregate, self._with_response = squared, aggregate, response
        self._identity: int | None = None
        self._unclear: Tensor | None = None  # the moments that were found so
        self._adder: kernels.Adder | None = None  # for blocks of a shape
        self._added: torch.Size | None = None
        vector, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._add_states(exact_samples=torch.tensor(0), row_spread=vector)
        self._add_states(references=matrix, squares=matrix, sums=matrix)
        if squared:
            # The names of states also tell collections of metrics which measures may share them.
            parts = torch.zeros(0, 0, 0, dtype=torch.float64)
            self._add_states(plain_samples=torch.tensor(0), centres=parts.float())
            self._add_states(plain_moments=parts, plain_columns=parts.float())
        if response:
            self._add_states(changes=matrix)

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """The family shares its states; those of standard deviations are others."""
        shared: list[Hashable] = [("squared deviations", self.squared)]
        return frozenset([*shared, "response"] if self._with_response else shared)

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Learn which transformation changes nothing."""
        self._identity = transformations.identity

    def dead(self) -> Tensor | None:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self._row_spread() == 0) & (self._column_spread() == 0).all(0))

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        # A device without float64 has only the exact way.
        if not (self.squared and self.row_spread.dtype == torch.float64 and holds_plain(x) and self._add_plain(x)):
            self._add_exact(x)
        if self._with_response and self._known is not None:
            changes = channel_changes(x, math.prod(self._known[2][:1]), self._identity)
            self.changes = self.changes + changes if self.changes.numel() else changes

    def add(self, st_block: Tensor, **of_rows: Any) -> None:
        """Add rows as ``update`` does; with no more ado where they are like those before."""
        adder = self._adder
        if (
            adder is not None
            and st_block.shape == self._added
            and kernels.takes(st_block)
            and adder.sums[2] is self.plain_moments
            and self._unclear is not self.plain_moments
            and self._update_count + 1 not in MOVE_CENTRES
        ):
            clear = adder(st_block)
            if clear is not None:
                if not clear:
                    self._move_centres(self._plain())
                self.n_samples = self.n_samples + st_block.shape[0]
                self._update_count += 1
                return
        super().add(st_block, **of_rows)
        self._adder = None
        if self.update_rule == SQUARES_ALONE and self.centres.numel():
            x = st_block.flatten(2)
            if holds_plain(x) and kernels.takes(x):
                self._adder, self._added = kernels.Adder(x, *self._plain()), st_block.shape

    def _plain(self) -> PlainSums:
        return PlainSums(self.plain_samples, self.centres, self.plain_moments, self.plain_columns)

    def _set_plain(self, sums: PlainSums) -> None:
        self.plain_samples, self.centres, self.plain_moments, self.plain_columns = sums

    def _move_centres(self, sums: PlainSums) -> None:
        """Keep sums about the means, since about centres far from them squares would cancel."""
        self._set_plain(sums.about_means())
        if not self._plain().clear():  # the rows so far did no harm yet, but further ones would
            self._unclear = self.plain_moments

    def _add_plain(self, x: Tensor) -> bool:
        """Add rows to the plain set, and say whether it took them.

        Few rows seldom tell whether float32 will do for all of many activations. Those that had to go to the exact set
        come along as soon as it does; that is tried each time that they have become four times as many.
        """
        n = int(self.plain_samples)
        waiting = 0 if n else int(self.exact_samples)
        if n and self._unclear is self.plain_moments and self._update_count not in MOVE_REFERENCES:
            return False
        if waiting and (waiting + len(x)).bit_length() // 2 == waiting.bit_length() // 2:
            return False
        sums = self._plain_so_far(x, n, waiting)
        clear = add_plain(x, sums)
        if clear is None:
            return False
        if n and not clear:
            self._move_centres(sums)
        elif n and self._update_count in MOVE_CENTRES:
            self._set_plain(sums.about_means())
        elif n:
            self._set_plain(sums)
        else:
            sums = sums.about_means()
            if not sums.clear():
                return False
            self._set_plain(sums)
        if waiting:
            for name in EXACT:
                setattr(self, name, torch.as_tensor(self._defaults[name]).to(x.device, copy=True))
        return True

    def _plain_so_far(self, x: Tensor, n: int, waiting: int) -> PlainSums:
        """Sums that may be changed."""
        if n:
            sums = self._plain()
            return sums if self.in_place else PlainSums(*(state.clone() for state in sums))
        return self._exact_as_plain() if waiting else PlainSums.empty(x)

    def _exact_as_plain(self) -> PlainSums:
        """The exact set about one centre for each activation."""
        centres = (self.references + self.sums / self.exact_samples).mean(0, keepdim=True).float()
        shift = self.references - centres
        columns = self.sums + self.exact_samples * shift
        squares = self.squares[0] + (shift * (self.sums + columns)).sum(0)
        moments = torch.stack([self.row_spread, squares])
        return PlainSums.of(self.exact_samples.clone(), centres, moments, columns.float())

    def _add_exact(self, x: Tensor) -> None:
        if not self.references.numel():
            self.references = x[0].to(self.row_spread.dtype, copy=True)
            self.row_spread, self.squares, self.sums = exact_sums(x, self.references, self.squared)
        else:
            if self._update_count in MOVE_REFERENCES:
                n = self.exact_samples
                moved = torch.add(self.references, self.sums / n).to(x.dtype).to(self.sums.dtype)
                self.squares, self.sums = self._about(self.squares, self.sums, self.references - moved, n)
                self.references = moved
            block = exact_sums(x, self.references, self.squared)
            self.row_spread = self.row_spread + block.row_spread
            self.squares, self.sums = self.squares + block.squares, self.sums + block.sums
        self.exact_samples = self.exact_samples + len(x)

    def _about(self, squares: Tensor, sums: Tensor, shift: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Squares and sums of n deviations that all grow by ``shift``."""
        grown = sums + n * shift
        return squares + self._over_columns(shift * (sums + grown)), grown

    def _over_columns(self, values: Tensor) -> Tensor:
        """Sum (transformations, activations) to the shape of ``squares``."""
        return values.sum(0, keepdim=True) if self.squared else values

    def _row_spread(self) -> Tensor:
        """Squared deviations from the row means, or the sum of the rows' standard deviations: (k,)."""
        if not self.squared or not self.centres.numel():
            return self.row_spread
        plain = self._plain().row_spread()
        return plain + self.row_spread if self.references.numel() else plain

    def _column_spread(self) -> Tensor:
        """Squared deviations from the column means: (1, k), or (m, k) where ``squared`` is false."""
        if self.found is None or self.found[0] is not self.n_samples:
            plain = self.squared and not self.references.numel()  # their means are not needed here
            spread = self._plain().column_spread()[None] if plain else self._columns_joined()[0]
            self.found = self.n_samples, spread
        return self.found[1]

    def _columns_joined(self) -> tuple[Tensor, Tensor]:
        """Squared deviations from the column means, and the column means (m, k), of both sets of rows."""
        found = []
        if self.squared and self.centres.numel():
            sums = self._plain()
            found.append((sums.rows, sums.column_spread()[None], sums.column_means()))
        if self.references.numel():
            n_exact = self.exact_samples
            spread = (self.squares - self._over_columns(self.sums.square()) / n_exact).clamp_min_(0)
            found.append((n_exact, spread, self.references + self.sums / n_exact))
        if len(found) == 1:
            return found[0][1:]
        # Two sets of rows with different means (Chan, Golub and LeVeque 1983, the paper's reference 20).
        (n_a, spread_a, means_a), (n_b, spread_b, means_b) = found
        part = n_b / self.n_samples.to(means_b.dtype)
        between = self._over_columns((means_a - means_b).square()) * (n_a * part)
        return spread_a + spread_b + between, means_a + (means_b - means_a) * part

    def _merge(self, a: States, b: States) -> States:
        plain = self._merge_plain(a, b) if self.squared else {}
        response = {"changes": a["changes"] + b["changes"]} if self._with_response else {}
        return {**plain, **self._merge_exact(a, b), **response}

    def _merge_plain(self, a: States, b: States) -> States:
        if not a["centres"].numel() or not b["centres"].numel():
            return {name: (a if a["centres"].numel() else b)[name] for name in PLAIN}
        mine, other = (PlainSums(*(states[name] for name in PLAIN)) for states in (a, b))
        moved = other.about(mine.centres)
        joined = mine.rows + moved.rows, mine.centres, mine.moments + moved.moments, mine.columns + moved.columns
        return dict(zip(PLAIN, joined, strict=True))

    def _merge_exact(self, a: States, b: States) -> States:
        if not a["references"].numel() or not b["references"].numel():
            return {name: (a if a["references"].numel() else b)[name] for name in EXACT}
        shift, n = b["references"] - a["references"], b["exact_samples"]
        squares, sums = self._about(b["squares"], b["sums"], shift, n)
        return {
            "exact_samples": a["exact_samples"] + n,
            "row_spread": a["row_spread"] + b["row_spread"],
            "references": a["references"],
            "squares": a["squares"] + squares,
            "sums": a["sums"] + sums,
        }

    def _transformation_variance(self) -> Tensor:
        m = self.n_transformations
        mean = self._row_spread() / self.n_samples
        return self._shaped(mean / (m - 1) if self.squared else mean)

    def _sample_variance(self) -> Tensor:
        variance = self._column_spread() / (self.n_samples - 1)
        if self.squared:
            return self._shaped(variance[0] / self.n_transformations)
        return self._shaped(variance.sqrt().mean(0))

    def _changes(self) -> Tensor | None:
        """Half the mean squared change from the identity, or the mean squared deviation: (m, channels)."""
        if not self._with_response or not self.changes.numel():
            return None
        size, m = math.prod(self.activation_shape.tolist()[1:]), self.n_transformations
        spread: Tensor = self.changes / (self.n_samples * size)
        return spread / 2 if self._identity is not None else spread * m / (m - 1)

    def _aggregated(self, values: Tensor) -> Tensor:
        return aggregate_maps(values, self.aggregate)

    def _undefined(self) -> Tensor:
        return torch.full(self.activation_shape.tolist(), torch.nan, dtype=torch.float64, device=self.device)
