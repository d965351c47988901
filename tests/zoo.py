"""Networks that nobody here wrote, with random weights: what `evaluate` measures of them with its default arguments.

By hand, after `pip install -e ".[dev,zoo]"`:

    python tests/zoo.py                       # all of them, in about an hour on 2 cores
    python tests/zoo.py "timm/*" torchvision/resnet18
    python tests/zoo.py --markdown table.md   # also writes the table of examples/models.md

For each network: the measured layers, the layers that are left out and why, the largest relative difference of a
layer mean between two batch sizes (in float64, where the network runs in it), and which share of the tensors that its
functions compute from the input is measured with `operations=True`. Views and copies are not counted, since they hold
no new values, and what a function such as `F.normalize` or multi-head attention computes within is told apart. Networks
whose library is not installed are passed over.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_networks import NETWORKS, Network

from lightning_invariance import evaluate
from lightning_invariance.model.hooks import catch_activations
from lightning_invariance.model.selection import select_layers

#: Kernels that change where values are, but not what they are, or that take only a shape.
COPIES = frozenset(["clone", "copy_", "_to_copy", "as_strided_", "fill_", "contiguous", "resize_", "set_"])
COPIES |= {f"{how}_{what}" for how in ("new",) for what in ("zeros", "ones", "full", "empty", "empty_strided")}
COPIES |= {f"{what}_like" for what in ("zeros", "ones", "full", "empty")}

HEADINGS = ("network", "measured", "left out", "two batch sizes", "operations seen", "seconds")


class Computed(TorchDispatchMode):
    """Every tensor that a kernel computes from the input, told apart by its memory and its version.

    Args:
        inputs: what everything else is computed from.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.found: dict[tuple[int, int], str] = {}
        self._tainted = {_memory(inputs)}
        self._kept: list[Any] = [inputs]  # memory that is freed would be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        memory = {_memory(each) for each in given}
        if memory & self._tainted:
            results, kernel = _tensors(output), func.overloadpacket.__name__
            self._kept += results
            self._tainted |= {_memory(each) for each in results}
            for each in results[:1]:  # the others are for the backward pass, such as the mean of a layer norm
                in_place = any(each is arg for arg in given)
                version = each._version + in_place  # which is counted after the kernel has run
                if kernel in COPIES and in_place and (known := self.found.pop((_memory(each), version - 1), "")):
                    self.found[_memory(each), version] = known
                new = kernel not in COPIES and (in_place or _memory(each) not in memory)
                if new and each.is_floating_point() and each.numel():
                    self.found[_memory(each), version] = kernel
        return output


class Functions(TorchFunctionMode):
    """Tells what functions return from what they compute on the way.

    Args:
        computed: by kernels.
    """

    def __init__(self, computed: Computed) -> None:
        super().__init__()
        self.within: dict[tuple[int, int], str] = {}
        self._computed = computed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = set(self._computed.found)
        output = func(*args, **(kwargs or {}))
        returned = {_memory(each) for each in _tensors((args, kwargs, output))}
        for key in self._computed.found.keys() - before:
            if key[0] not in returned:
                self.within[key] = f"{getattr(func, '__name__', '')}:{self._computed.found.pop(key)}"
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def share_seen(network: Network) -> tuple[float, str]:
    """Which share of the computed tensors is measured, and in words what is not."""
    model, x = network.model.eval(), network.data[: network.inputs]
    seen: set[tuple[int, int]] = set()
    computed = Computed(x)
    functions = Functions(computed)

    def consumer(layer: str, output: Tensor, channel_axis: int | None) -> None:
        seen.add((_memory(output), output._version))

    selection = select_layers(model, None, operations=True)
    with (
        torch.no_grad(),
        catch_activations(model, selection, consumer) as catcher,
        computed,
        functions,
        catcher.forward_pass(),
    ):
        model(x) if network.forward is None else network.forward(model, x)
    missed = Counter(name for key, name in computed.found.items() if key not in seen)
    within = Counter(functions.within.values())
    parts = [
        f"{what}: " + ", ".join(f"{n} {name}" for name, n in counter.most_common(6)) if counter else ""
        for what, counter in (("not seen", missed), ("within functions", within))
    ]
    return 1 - missed.total() / max(1, len(computed.found)), "; ".join(filter(None, parts))


def difference(network: Network) -> str:
    """The largest relative difference of a layer mean between two batch sizes."""
    run = {"forward": network.forward, "progress": False}
    data, name = network.data, "float64"
    try:
        network.model.double()
        data = data.double() if data.is_floating_point() else data
        whole = evaluate(network.model, data, network.transformations, **run)
    except Exception:
        network.model.float()
        data, name = network.data, "float32"
        whole = evaluate(network.model, data, network.transformations, **run)
    parts = evaluate(network.model, data, network.transformations, batch_size=network.small_batch, **run)
    network.model.float()
    one, other = whole.per_layer(), parts.per_layer()
    if one.keys() != other.keys():
        return f"other layers: {sorted(one.keys() ^ other.keys())[:3]}"
    worst = max(abs(one[layer] / other[layer] - 1) if one[layer] else 0.0 for layer in one)
    return f"{worst:.0e}" + ("" if name == "float64" else f" ({name})")


@dataclass
class Row:
    """Findings for one network; the fields are the columns of the table."""

    network: str
    measured: str = ""
    left_out: str = ""
    batches: str = ""
    operations: str = ""
    seconds: str = ""


def row_of(name: str, make: Callable[[], Network]) -> Row:
    """Measure one network."""
    torch.manual_seed(0)
    network, start = make(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(network.model, network.data, network.transformations, forward=network.forward, progress=False)
        seconds = time.perf_counter() - start
        share, missed = share_seen(network)
        differs = difference(network)
    print(f"      {missed}", flush=True)
    reasons = Counter(why.partition(":")[0] for why in result.left_out.values())
    return Row(
        name,
        str(len(result.layers)),
        ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "–",
        differs,
        f"{100 * share:.0f} %",
        f"{seconds:.1f}",
    )


def main() -> None:
    """Run the networks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    rows, failed = [], []
    for name, make in NETWORKS.items():
        if not any(fnmatch(name, pattern) for pattern in options.patterns):
            continue
        try:
            row = row_of(name, make)
        except ModuleNotFoundError as error:
            print(f"{name}: passed over, {error}", flush=True)
            continue
        except Exception as error:
            traceback.print_exc()
            row = Row(name, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            failed.append(name)
        rows.append(row)
        print(" | ".join(vars(row).values()), flush=True)
    if options.markdown:
        lines = [
            " | ".join(each) for each in (HEADINGS, ["---"] * len(HEADINGS), *(vars(row).values() for row in rows))
        ]
        options.markdown.write_text("".join(f"| {line} |\n" for line in lines))
    sys.exit(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
