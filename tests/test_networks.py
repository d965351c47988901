"""A small network of each kind: every layer and operation has the value of the definition on stored activations.

Each network keeps what it computes under the name that the result must give it. The expected values come from calls
with one input at a time, where it is clear what belongs to which sample.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_invariance import TransformationSet, evaluate, functional, layer_names, rotations

N, M = 9, 4
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(N, 3, 8, 8, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(0, 20, (N, 6), generator=GENERATOR)
TURNS = rotations(M)
ROLLS = TransformationSet.from_callables({str(k): (lambda x, k=k: x.roll(k, 1)) for k in range(M)})

#: Outputs that the running network keeps, by name; nothing while it is measured.
keeping = []


def keep(name, value):
    for kept in keeping:
        kept[name] = value.clone()
    return value


class Residual(nn.Module):
    """Functions, operators and work in place between convolutions; a shared activation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.bn = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 2)

    def forward(self, x):
        y = keep("Residual-relu", F.relu(keep("conv1", self.conv1(x)), inplace=True))
        z = keep("act", self.act(keep("bn", self.bn(y))))
        z = keep("conv2", self.conv2(z))
        z += y
        keep("Residual-add", z)
        z = keep("act#1", self.act(z))
        z = keep("Residual-cat", torch.cat([z, keep("Residual-gelu", F.gelu(z))], 1))
        z = keep("Residual-adaptive_avg_pool2d", F.adaptive_avg_pool2d(z, 1))
        return keep("head", self.head(z.flatten(1)))


class Windows(nn.Module):
    """Shifted windows, folded into the batch after the samples, with a table of relative positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.table = nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Linear(2, 16)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        y = keep("norm", self.norm(keep("embed", self.embed(x)).permute(0, 2, 3, 1)))
        y = keep("Windows-roll", torch.roll(y, (1, 1), (1, 2)))
        b = len(y)
        windows = y.view(b, 4, 2, 4, 2, 4).transpose(2, 3).reshape(b * 16, 4, 4)  # 16 windows of 4 pixels
        q, k, v = keep("qkv", self.qkv(windows)).chunk(3, -1)
        scores = keep("Windows-matmul", q @ k.transpose(1, 2))
        scores = keep("Windows-add", scores + self.table(torch.ones(1, 2, dtype=x.dtype)).view(1, 4, 4))
        mixed = keep("Windows-matmul#1", keep("Windows-softmax", scores.softmax(-1)) @ v)
        return keep("out", self.out(mixed)).view(b, 4, 4, 2, 2, 4)


class Folded(nn.Module):
    """Heads folded into the batch, and windows of which one axis comes before the samples and one after."""

    def __init__(self):
        super().__init__()
        self.conv, self.heads, self.both = nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Linear(4, 5)

    def forward(self, x):
        y = keep("conv", self.conv(x))
        keep("heads", self.heads(y.flatten(2).transpose(1, 2).unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)))
        windows = y.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(2, 0, 4, 3, 5, 1)
        return keep("both", self.both(windows.reshape(2 * len(y) * 2, 16, 4)))


class SliceMajor(nn.Module):
    """Patches folded into the batch before the samples, and taken apart again."""

    def __init__(self):
        super().__init__()
        self.local, self.out = nn.Conv2d(3, 4, 3), nn.Linear(16, 3)

    def forward(self, x):
        patches = torch.cat([x[..., i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)])
        y = keep("local", self.local(keep("SliceMajor-cat", patches)))
        y = keep("SliceMajor-mean", y.mean((2, 3)))
        together = keep("SliceMajor-cat#1", torch.cat(y.chunk(4), 1))
        return keep("out", self.out(together))


class TimeFirst(nn.Module):
    """A transformer with time before the samples, as long as a batch may be."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 8)
        self.attention, self.norm, self.mlp = nn.MultiheadAttention(8, 2), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        y = keep("embed", self.embed(x.transpose(1, 2).flatten(2)).transpose(0, 1))  # 8 rows of the image
        attended, weights = self.attention(y, y, y)
        keep("attention[0]", attended)
        keep("attention[1]", weights)
        y = keep("norm", self.norm(keep("TimeFirst-add", y + attended)))
        return keep("TimeFirst-add#1", y + keep("TimeFirst-relu", F.relu(keep("mlp", self.mlp(y)))))


class Language(nn.Module):
    """Tables of tokens and positions, a causal mask, and a state from step to step."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.cell = nn.Embedding(20, 6), nn.Embedding(6, 6), nn.GRUCell(6, 5)

    def forward(self, x):
        y = keep("tokens", self.tokens(x))
        y = keep("Language-add", y + self.positions(torch.arange(6))[None])
        mask = torch.full((6, 6), -torch.inf, dtype=y.dtype).triu(1)
        scores = keep("Language-add#1", keep("Language-matmul", y @ y.transpose(1, 2)) + mask)
        y = keep("Language-matmul#1", keep("Language-softmax", F.softmax(scores, -1)) @ y)
        state = None
        for step in range(3):
            state = self.cell(y[:, step], state)
            keep("cell" if step == 0 else f"cell#{step}", state)
        return state


class Flow(nn.Module):
    """Two images in one batch, and the products of all pairs of their positions."""

    def __init__(self):
        super().__init__()
        self.encode, self.update = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 2)

    def forward(self, x):
        both = torch.cat([x, keep("Flow-flip", x.flip(-1))])
        one, other = keep("encode", self.encode(keep("Flow-cat", both))).chunk(2)
        pairs = torch.einsum("bchw,bcij->bhwij", one, other)
        return keep("update", self.update(keep("Flow-einsum", pairs).flatten(1, 2).flatten(2)))


class Video(nn.Module):
    """Frames as an axis of their own, and folded into the batch."""

    def __init__(self):
        super().__init__()
        self.conv3d, self.conv2d = nn.Conv3d(1, 2, 3), nn.Conv2d(2, 3, 3)

    def forward(self, x):
        y = keep("conv3d", self.conv3d(x[:, None]))  # (b, 2, 1, 6, 6): three frames become one
        return keep("conv2d", self.conv2d(y.transpose(1, 2).flatten(0, 1)))


class Graph(nn.Module):
    """Nodes of all graphs in one list, messages along edges, and the sum of each graph."""

    def __init__(self):
        super().__init__()
        self.message, self.out = nn.Linear(24, 5), nn.Linear(5, 2)

    def forward(self, x):
        b = len(x)
        nodes = x.transpose(1, 2).flatten(2).flatten(0, 1)  # 8 rows of each image
        start = torch.arange(8).repeat(b) + 8 * torch.arange(b).repeat_interleave(8)
        end = (torch.arange(8) + 1).remainder(8).repeat(b) + 8 * torch.arange(b).repeat_interleave(8)
        sent = keep("Graph-index_select", keep("message", self.message(nodes)).index_select(0, start))
        got = torch.zeros(8 * b, 5, dtype=x.dtype).index_add(0, end, sent)
        got = keep("Graph-relu", keep("Graph-index_add", got).relu())
        of_graph = torch.arange(b).repeat_interleave(8)
        pooled = torch.zeros(b, 5, dtype=x.dtype).index_add(0, of_graph, got)
        return keep("out", self.out(keep("Graph-index_add#1", pooled)))


class Detector(nn.Module):
    """Anchors that are the same for all images, and as many regions as there are."""

    def __init__(self):
        super().__init__()
        self.conv, self.anchors, self.box = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = keep("conv", self.conv(x)).flatten(2).transpose(1, 2)
        y = keep("Detector-add", y + self.anchors(torch.ones(4, 2, dtype=x.dtype)))
        regions = y[y[..., 0] > y[..., 0].mean()]
        return self.box(regions)


class Experts(nn.Module):
    """Tokens of all samples sorted by the expert that takes them."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert = nn.Linear(24, 2), nn.Linear(24, 3)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2).flatten(0, 1)
        order = keep("gate", self.gate(tokens))[:, 0].argsort()
        sorted_tokens = self.expert(tokens[order])  # mixed: where a token stands depends on the others
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return keep("Experts-getitem#1", sorted_tokens[back])


@dataclass
class Spectrum:
    values: torch.Tensor
    size: torch.Tensor


class Transform(nn.Module):
    def forward(self, x):
        spectrum = torch.fft.rfft2(x)
        return Spectrum(spectrum, spectrum.abs())


class Spectral(nn.Module):
    """Complex numbers, in a dataclass."""

    def __init__(self):
        super().__init__()
        self.transform = Transform()

    def forward(self, x):
        found = self.transform(x)
        keep("transform[values][real]", found.values.real)
        keep("transform[values][imag]", found.values.imag)
        keep("transform[size]", found.size)
        return keep("Spectral-log1p", found.size.log1p())


NETWORKS = {
    Residual: {},
    Windows: {"table": "constant"},
    Folded: {},
    SliceMajor: {},
    TimeFirst: {},
    Language: {"positions": "constant"},
    Flow: {},
    Video: {},
    Graph: {},
    Detector: {"anchors": "constant", "box": "ragged", "Detector-getitem": "ragged", "Detector-mean": "mixed"},
    Experts: {"expert": "mixed", "Experts-getitem": "mixed"},
    Spectral: {},
}


def network(kind):
    torch.manual_seed(0)
    return kind().double().eval()


def data_of(kind):
    return (TOKENS, ROLLS) if kind is Language else (IMAGES, TURNS)


def expected(kind):
    """Name → Normalized Variance of the stored activations, from one input at a time."""
    model, (data, transformations) = network(kind), data_of(kind)
    rows = {}
    for inputs in transformations(data).flatten(0, 1):
        keeping.append({})
        with torch.no_grad():
            model(inputs[None])
        for name, value in keeping.pop().items():
            rows.setdefault(name, []).append(value.flatten())
    return {name: functional.normalized_variance(torch.stack(r).unflatten(0, (N, M))) for name, r in rows.items()}


def measured(kind, batch_size):
    data, transformations = data_of(kind)
    return evaluate(network(kind), data, transformations, operations=True, batch_size=batch_size, progress=False)


def check(kind, values):
    for name, value in expected(kind).items():
        found = values[name].flatten()
        assert torch.allclose(found, value, rtol=1e-9, atol=1e-12, equal_nan=True), (name, found, value)


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("batch_size", [1, 64])  # and 7 below
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_and_operation_has_the_value_of_its_cube(kind, batch_size):
    result = measured(kind, batch_size)
    check(kind, result["NormalizedVariance"])
    assert set(result.layers) == set(expected(kind))
    assert {layer: why.partition(":")[0] for layer, why in result.left_out.items()} == NETWORKS[kind]


@pytest.mark.parametrize("kind", NETWORKS)
def test_names_are_known_beforehand(kind):
    names = layer_names(network(kind), example=data_of(kind)[0], operations=True)
    assert set(names) == set(expected(kind))


def values_of_every_network():
    return {kind.__name__: dict(measured(kind, 7)["NormalizedVariance"]) for kind in NETWORKS}


def test_three_processes_agree(ranks):
    for found in ranks(values_of_every_network):
        for kind in NETWORKS:
            check(kind, found[kind.__name__])
