"""The sums behind all measures of distance: those within rows, and samples kept for those in columns."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.distance import DISTANCES, Distance, distance_between
from lightning_invariance.measures.base import States
from lightning_invariance.measures.pairs import absolute_differences, euclidean_distances
from lightning_invariance.measures.spread import chunks
from lightning_invariance.measures.subsample import EMPTY, choose, indices_of_contents, keys_of, last_key
from lightning_invariance.measures.variance_sums import VarianceMeasure
from lightning_invariance.transforms import TransformationSet


class DistanceMeasure(VarianceMeasure):
    r"""Shared update of the distance measures: distances within the rows, and samples kept for those in the columns.

    ``distance="squared"`` needs only the sums of :class:`VarianceMeasure` (paper, eq. 7). Otherwise the states are

    - ``row_distances`` (k,): the sum over rows of the distances of all ordered pairs within the row;
    - ``keys`` (m, samples) and ``kept`` (m, samples, k): for each column, the values of the samples with the smallest
      keys. A key is a random number made of the sample and the column, so that the choice is the same for every order,
      batch size, number of processes and order of merging. Different columns keep different samples, which makes
      their mean far more precise than a choice of whole rows would. ``flawed`` (k,): whether an activation was NaN or
      infinite for any sample, kept or not.
    """

    row_distances: Tensor
    keys: Tensor
    kept: Tensor
    flawed: Tensor

    read_states = (*VarianceMeasure.read_states, "keys")

    #: Which of the two sums a measure needs.
    needs_rows = True
    needs_columns = True

    def __init__(
        self,
        distance: Distance = "abs",
        over: str = "activation",
        samples: int = 16,
        aggregate: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(squared=True, aggregate=aggregate, **kwargs)
        if over not in ("activation", "channel"):
            raise ValueError(f'Expected argument `over` to be "activation" or "channel", but got {over!r}.')
        if not callable(distance) and distance not in DISTANCES:
            raise ValueError(
                f"Expected argument `distance` to be one of {DISTANCES} or a function, but got {distance!r}."
            )
        if over == "activation" and distance in ("euclidean", "cosine"):
            raise ValueError(
                f'Expected argument `distance` to be "abs", "squared" or a function for `over="activation"`, whose'
                f" values are scalars, but got {distance!r}."
            )
        if not isinstance(samples, int) or samples < 2:
            raise ValueError(f"Expected argument `samples` to be an int larger than 1, but got {samples}.")
        self.distance, self.over, self.samples = distance, over, samples
        self._expected = 0
        self._choices: dict[Hashable, Any] = {}
        if distance != "squared" and self.needs_rows:
            self._add_states(row_distances=torch.zeros(0, dtype=torch.float64))
        if distance != "squared" and self.needs_columns:
            self._add_states(keys=torch.zeros(0, 0, dtype=torch.long), kept=torch.zeros(0, 0, 0))
            self._add_states(flawed=torch.zeros(0, dtype=torch.bool))

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """The two sums are shared with measures of the same distance."""
        if self.distance == "squared":
            return super().update_rule
        needs = {"rows": self.needs_rows, "columns": self.needs_columns}
        about = (self.distance, self.over, self.samples)
        return frozenset((DistanceMeasure, part, *about) for part, needed in needs.items() if needed)

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Learn which samples there will be."""
        super().prepare(transformations, input_shape)
        self._expected = n_samples or 0

    def update(
        self, st_block: Tensor, indices: Tensor | None = None, choices: dict[Hashable, Any] | None = None
    ) -> None:
        """Add complete rows of the ST matrix.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.
            indices: ``(samples,)``: whole numbers that name the samples. Without them samples are told apart by their
                activations, which costs a little time.
            choices: one dict for the measures of all layers that are updated with these samples, and for no other
                samples: those that choose among them in the same way then do it once.

        Raises:
            ValueError: If the block does not fit to those before.
            TypeError: If the block is not of a real floating-point type.
        """
        self._choices = {} if choices is None else choices
        self._update(st_block, **({} if indices is None else {"indices": indices}))
        self._choices = {}

    def dead(self) -> Tensor | None:
        """Which activations never changed; known with ``distance="squared"``."""
        return super().dead() if self.distance == "squared" else None

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        if self.distance == "squared":
            super()._add(x)
            return
        if self.needs_rows:
            total = self._row_distances(x)
            self.row_distances = self.row_distances + total if self.row_distances.numel() else total
        if self.needs_columns:
            self._keep(x, of_rows.get("indices"))

    def _row_distances(self, x: Tensor) -> Tensor:
        """The distances of all ordered pairs within the rows, summed over rows, in float64."""
        if self.distance == "abs" and self.over == "activation":
            return torch.cat([absolute_differences(values) for values in chunks(x)], -1)
        return 2 * self._pairs(self._maps(x)).sum(0)

    def _pairs(self, maps: Tensor) -> Tensor:
        """The sum of the distances of all unordered pairs within the rows of (n, m, channels, positions)."""
        if self.distance == "euclidean":
            return euclidean_distances(maps)
        m = maps.shape[1]
        total = 0 * distance_between(maps[:, 0], maps[:, 0], self.distance, self.over).double()
        for shift in range(1, m):
            distances = distance_between(maps[:, : m - shift], maps[:, shift:], self.distance, self.over)
            total = total + distances.double().sum(1)
        return total.flatten(1) if self.over == "activation" else total

    def _maps(self, x: Tensor) -> Tensor:
        """``(n, m, k)`` → ``(n, m, channels, positions)``."""
        shape = self.activation_shape.tolist()
        return x.reshape(*x.shape[:2], shape[0] if shape else 1, -1)

    def _keep(self, x: Tensor, indices: Tensor | None) -> None:
        if not self.flawed.numel():
            self.flawed = torch.zeros(x.shape[2], dtype=torch.bool, device=x.device)
        if not x.is_cpu or not x.sum().isfinite():  # to look at the sum would be to wait for another device
            self.flawed = self.flawed | ~x.isfinite().flatten(0, 1).all(0)
        if not self.keys.numel():
            m = x.shape[1]
            with torch.inference_mode(False):  # what is made in inference mode could be changed only there
                self.keys = torch.full((m, self.samples), EMPTY)
                self.kept = torch.zeros(m, self.samples, x.shape[2], dtype=x.dtype, device=x.device)
        (columns, leaving, _, keys), places = self._chosen(x, indices)
        if len(columns):
            # In place, unlike all other states: it is by far the largest, and nobody else holds it.
            self.keys[columns, leaving] = keys
            columns, leaving, entering = places
            self.kept[columns, leaving] = x[entering, columns].to(self.kept.dtype)

    def _chosen(self, x: Tensor, indices: Tensor | None) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Which of the rows enter, and where; see ``choose``. The places also on the device of the rows."""
        if indices is None:
            chosen = choose(self.keys, keys_of(indices_of_contents(x).cpu(), x.shape[1]))
            return chosen, [each.to(x.device) for each in chosen[:3]]
        how = (DistanceMeasure, self.keys.shape, self._expected, x.device, *indices.tolist())
        kept, chosen, places = self._choices.get(how, (None, None, None))
        if kept is None or not torch.equal(kept, self.keys):
            candidates = keys_of(indices.cpu(), x.shape[1])
            if self._expected:  # those that leave again later need not enter
                last = last_key(self._expected, x.shape[1], self.samples)
                candidates = torch.where(candidates <= last, candidates, EMPTY)
            chosen = choose(self.keys, candidates)
            places = [each.to(x.device, non_blocking=True) for each in chosen[:3]]
            self._choices[how] = self.keys.clone(), chosen, places
        return chosen, places

    def _merge(self, a: States, b: States) -> States:
        if self.distance == "squared":
            return super()._merge(a, b)
        merged = {name: a[name] for name in self._defaults}
        if self.needs_rows:
            merged["row_distances"] = a["row_distances"] + b["row_distances"]
        if self.needs_columns:
            keys, kept = torch.cat([a["keys"], b["keys"]], 1), torch.cat([a["kept"], b["kept"]], 1)
            merged["flawed"] = a["flawed"] | b["flawed"]
            order = keys.argsort(dim=1, stable=True)[:, : self.samples]
            merged["keys"], merged["kept"] = keys.gather(1, order), kept[torch.arange(len(keys))[:, None], order]
        return merged

    def _transformation_distance(self) -> Tensor:
        n, m = self.n_samples, self.n_transformations
        if self.distance == "squared":
            return self._summed(2 * (m - 1) / m * self._transformation_variance())
        return self._summed(self.row_distances / (n * m * m))

    def _sample_distance(self) -> Tensor:
        n = int(self.n_samples)
        if self.distance == "squared":
            return self._summed(2 * (n - 1) / n * self._sample_variance())
        full = self.keys != EMPTY
        counts = full.sum(1).tolist()
        if len(set(counts)) == 1:
            s = counts[0]
            kept = self.kept if s == self.samples else self.kept[full].view(len(full), s, -1)
            mean = self._row_distances(kept).flatten() / (s * (s - 1) * len(kept))
        else:  # fewer samples came than were announced, as in a layer that does not always run
            parts = [values[places][None] for values, places, s in zip(self.kept, full, counts, strict=True) if s > 1]
            of_columns = [self._row_distances(part).flatten() / (part.shape[1] * (part.shape[1] - 1)) for part in parts]
            mean = torch.stack(of_columns).mean(0) if parts else torch.full_like(self.kept[0, 0].double(), torch.nan)
        flawed = self.flawed
        if self.over == "channel":
            flawed = self._maps(flawed[None, None])[0, 0].any(1)
        return self._summed(torch.where(flawed, torch.nan, mean) * ((n - 1) / n))

    def _summed(self, values: Tensor) -> Tensor:
        """The shape of the activation, or ``(channels,)``."""
        if self.over == "activation":
            return self._shaped(values.reshape(-1))
        if self.distance == "squared":
            return values.reshape(self.activation_shape.tolist()[0] if values.ndim else 1, -1).sum(1)
        return values.reshape(-1)

    def _undefined(self) -> Tensor:
        nan = super()._undefined()
        return nan if self.over == "activation" else nan.flatten(1).sum(1) if nan.ndim else nan.reshape(1)
