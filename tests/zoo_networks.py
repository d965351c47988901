"""The networks of `zoo.py`, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_invariance import TransformationSet, rotations

TURNS = rotations(3)


@dataclass
class Network:
    """A model and what it takes.

    Attributes:
        model: with random weights.
        data: samples.
        forward: where ``model(x)`` does not run it.
        transformations: of the samples.
        small_batch: a second batch size; the default takes all samples at once.
        inputs: how many inputs show which operations are seen.
    """

    model: nn.Module
    data: Tensor
    forward: Callable[[nn.Module, Tensor], Any] | None = None
    transformations: TransformationSet = TURNS
    small_batch: int = 6
    inputs: int = 2


def images(size: int = 64, channels: int = 3, count: int = 8) -> Tensor:
    """Random images."""
    return torch.rand(count, channels, size, size)


#: Shifts along the first axis after the batch: of tokens, or of samples of sound.
SHIFTS = TransformationSet.from_callables({f"shift {k}": partial(torch.roll, shifts=k, dims=-1) for k in range(3)})
TOKENS = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS |= {"intermediate_size": 64, "pad_token_id": 0}

NETWORKS: dict[str, Callable[[], Network]] = {}


def network(name: str) -> Callable[[Callable[[], Network]], Callable[[], Network]]:
    """Put a function that makes a network into the zoo."""

    def put(make: Callable[[], Network]) -> Callable[[], Network]:
        NETWORKS[name] = make
        return make

    return put


# torchvision


def _torchvision(name: str, data: Callable[[], Tensor], **options: Any) -> Network:
    from torchvision import models

    forward = options.pop("forward", None)
    weights = {"weights": None, "weights_backbone": None} if "backbone" in options else {"weights": None}
    options.pop("backbone", None)
    return Network(models.get_model(name, **weights, **options), data(), forward)


def _as_list(model: nn.Module, x: Tensor) -> Any:
    return model(list(x))


def _two_frames(model: nn.Module, x: Tensor) -> Any:
    return model(x, x.flip(-1), num_flow_updates=2)


CLASSIFIERS = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2
mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
swin_t swin_v2_t vgg11 vgg11_bn wide_resnet50_2""".split()  # noqa: SIM905 - a list would take a line for each
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
SMALL = {"min_size": 128, "max_size": 128}
FEW = {**SMALL, "box_detections_per_img": 4}
DETECTION: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": SMALL,
    "fasterrcnn_resnet50_fpn": FEW,
    "fcos_resnet50_fpn": SMALL,
    "keypointrcnn_resnet50_fpn": FEW,
    "maskrcnn_resnet50_fpn": FEW,
    "retinanet_resnet50_fpn": SMALL,
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}
VIDEO = {"r3d_18": 56, "mc3_18": 56, "r2plus1d_18": 56, "s3d": 224, "swin3d_t": 64}


def _video(name: str, size: int) -> Network:
    turned = TransformationSet.from_callables({label: partial(_turn_frames, j) for j, label in enumerate(TURNS.labels)})
    made = _torchvision(name, lambda: torch.rand(4, 3, 16, size, size))
    made.transformations, made.small_batch = turned, 3
    return made


def _turn_frames(which: int, x: Tensor) -> Tensor:
    return TURNS[which : which + 1](x.flatten(1, 2))[:, 0].view(x.shape)


NETWORKS |= {f"torchvision/{n}": partial(_torchvision, n, images) for n in CLASSIFIERS}
NETWORKS |= {
    f"torchvision/{n}": partial(_torchvision, n, partial(images, 96, count=4), init_weights=False, aux_logits=False)
    for n in ("googlenet", "inception_v3")
}
NETWORKS |= {
    f"torchvision/{n}": partial(_torchvision, n, partial(images, 224, count=4)) for n in ("vit_b_16", "maxvit_t")
}
NETWORKS |= {f"torchvision/{n}": partial(_torchvision, n, images, backbone=None) for n in SEGMENTATION}
NETWORKS |= {
    f"torchvision/{n}": partial(_torchvision, n, partial(images, 64, count=4), backbone=None, forward=_as_list, **o)
    for n, o in DETECTION.items()
}
NETWORKS |= {
    f"torchvision/{n}": partial(_torchvision, n, partial(images, 128, count=4), forward=_two_frames)
    for n in ("raft_small", "raft_large")
}
NETWORKS |= {f"torchvision/{n}": partial(_video, n, size) for n, size in VIDEO.items()}


@network("torchvision/quantized_mobilenet_v2")
def _quantized() -> Network:
    from torchvision.models import quantization

    return Network(quantization.mobilenet_v2(weights=None, quantize=True), images())


# timm: a small one of each family, at the smallest size that it takes

TIMM = """beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny convmixer_768_32
convnext_atto crossvit_9_240 cspresnet50 davit_tiny deit_tiny_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
inception_next_atto inception_v4 lcnet_035 levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 mixer_s32_224
mobilenetv3_small_050 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nasnetalarge nest_tiny nextvit_small
nf_regnet_b0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s
resmlp_12_224 resnest14d resnet10t resnetv2_50 rexnet_100 samvit_base_patch16_224 selecsls42 sequencer2d_s seresnet18
skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224
vit_relpos_small_patch16_224 volo_d1_224 vovnet39a xception41 xcit_nano_12_p16_224""".split()  # noqa: SIM905 - a list would take a line for each
#: Networks without a fixed input size run at 64×64; a few need more.
SIZES = {
    "convmixer_768_32": 64,
    "inception_v4": 96,
    "nasnetalarge": 96,
    "coat_tiny": 224,
    "samvit_base_patch16_224": 224,
}


def _timm(name: str) -> Network:
    import timm

    model = timm.create_model(name, pretrained=False)
    about = model.default_cfg
    fixed = about.get("fixed_input_size", False) or any(
        s in name for s in ("vit", "mixer", "mlp", "levit", "tnt", "_2")
    )
    size = SIZES.get(name) or (about["input_size"][-1] if fixed else 64)
    return Network(model, images(size, count=4 if size > 64 else 8), small_batch=3 if size > 64 else 6)


NETWORKS |= {f"timm/{name}": partial(_timm, name) for name in TIMM}


# Hugging Face transformers, tiny and from a configuration


def _tokens() -> Tensor:
    return torch.randint(1, 50, (8, 16))


def _transformer(model: str, data: Callable[[], Tensor], shifts: bool, forward: Any = None, **options: Any) -> Network:
    import transformers

    kind = getattr(transformers, model)
    made = kind(kind.config_class(**options))
    return Network(made, data(), forward, SHIFTS if shifts else TURNS)


def _both_ids(model: nn.Module, x: Tensor) -> Any:
    return model(input_ids=x, decoder_input_ids=x[:, :5])


def _with_text(model: nn.Module, x: Tensor) -> Any:
    return model(input_ids=torch.arange(1, 9).repeat(len(x), 1), pixel_values=x)


VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"intermediate_size": 64}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
CLIP = {"vision_config": VISION, "text_config": {**TOKENS, "max_position_embeddings": 16}, "projection_dim": 16}
SOUND = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SOUND |= {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embedding_groups": 4}
SOUND |= {"num_conv_pos_embeddings": 16}
BART = {"vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
OF_TOKENS: dict[str, dict[str, Any]] = {
    "BertModel": TOKENS,
    "RobertaModel": TOKENS,
    "ElectraModel": TOKENS,
    "AlbertModel": {**TOKENS, "embedding_size": 16},
    "DistilBertModel": {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "DebertaV2Model": {**TOKENS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "GPT2Model": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoXModel": TOKENS,
    "LlamaModel": TOKENS,
    "MistralModel": {**TOKENS, "num_key_value_heads": 2},
    "Qwen2Model": {**TOKENS, "num_key_value_heads": 2},
    "MixtralModel": {**TOKENS, "num_key_value_heads": 2, "num_local_experts": 4},
    "MambaModel": {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "T5EncoderModel": T5,
}
OF_IMAGES: dict[str, dict[str, Any]] = {
    "ViTModel": VISION,
    "DeiTModel": VISION,
    "BeitModel": VISION,
    "Dinov2Model": VISION,
    "CLIPVisionModel": VISION,
    "SiglipVisionModel": VISION,
    "SwinModel": SWIN,
    "Swinv2Model": SWIN,
    "ConvNextModel": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "SegformerModel": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4]},
    "ResNetModel": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    "PoolFormerModel": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
}
NETWORKS |= {f"transformers/{n}": partial(_transformer, n, _tokens, True, **o) for n, o in OF_TOKENS.items()}
NETWORKS |= {
    f"transformers/{n}": partial(_transformer, n, partial(images, o.get("image_size", 64)), False, **o)
    for n, o in OF_IMAGES.items()
}
NETWORKS |= {
    "transformers/T5Model": partial(_transformer, "T5Model", _tokens, True, forward=_both_ids, **T5),
    "transformers/BartModel": partial(_transformer, "BartModel", _tokens, True, **BART),
    "transformers/CLIPModel": partial(
        _transformer, "CLIPModel", partial(images, 32), False, forward=_with_text, **CLIP
    ),
    "transformers/Wav2Vec2Model": partial(_transformer, "Wav2Vec2Model", lambda: torch.randn(8, 800), True, **SOUND),
}


# Segmentation, graphs, groups


def _segmentation(kind: str, **options: Any) -> Network:
    import segmentation_models_pytorch as smp

    return Network(getattr(smp, kind)("resnet18", encoder_weights=None, **options), images(128, count=4), small_batch=3)


NETWORKS |= {
    f"segmentation_models_pytorch/{kind}": partial(_segmentation, kind)
    for kind in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus")
}


class _Graphs(nn.Module):
    """A batch of graphs of one form, as one graph of all nodes, and the mean of each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch_geometric import nn as pyg

        layer = getattr(pyg, kind)
        self.first, self.second, self.out = layer(8, 64), layer(64, 16), nn.Linear(16, 3)
        self.edges = torch.tensor([[0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5]])

    def forward(self, x: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        batch, nodes = x.shape[:2]
        of_graph = torch.arange(batch).repeat_interleave(nodes)
        edges = torch.cat([self.edges + nodes * i for i in range(batch)], dim=1)
        y = torch.relu(self.first(x.flatten(0, 1), edges))
        return self.out(global_mean_pool(torch.relu(self.second(y, edges)), of_graph))


def _graphs(kind: str) -> Network:
    turned = TransformationSet.from_callables({f"turn {k}": partial(torch.roll, shifts=k, dims=1) for k in range(3)})
    return Network(_Graphs(kind), torch.rand(8, 6, 8), transformations=turned)


NETWORKS |= {f"torch_geometric/{kind}": partial(_graphs, kind) for kind in ("GCNConv", "GATConv", "SAGEConv")}


@network("escnn/C4")
def _escnn() -> Network:
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(4)
    of_input, hidden = enn.FieldType(space, [space.trivial_repr] * 3), enn.FieldType(space, [space.regular_repr] * 4)

    class C4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = enn.R2Conv(of_input, hidden, 3, padding=1), enn.InnerBatchNorm(hidden)
            self.relu, self.conv2 = enn.ReLU(hidden), enn.R2Conv(hidden, hidden, 3, padding=1)
            self.invariant, self.head = enn.GroupPooling(hidden), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(self.relu(self.bn(self.conv(enn.GeometricTensor(x, of_input)))))
            return self.head(self.invariant(y).tensor.mean((2, 3)))

    return Network(C4(), images(15))
