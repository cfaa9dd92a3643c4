"""The architectures of docs/models.md: as published, and in small versions with equally many blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.efficientnet import _efficientnet_conf
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from resist.models import build

CLASSES, VOCABULARY, TOKENS, SMALL_TOKENS = 10, 200, 128, 16
transformers.utils.logging.set_verbosity_error()


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: Library and name.
        build: Builds the network as published.
        small: Builds the small version, which is run.
        small_name: Description of the small version.
        size: Pixels of the published network's images; None for a network that takes tokens.
        small_size: Pixels of the small version's images.
        chains: Names of the chains; empty for the default.
    """

    name: str
    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    small_name: str
    size: int | None = 224
    small_size: int = 32
    chains: tuple[str, ...] = ()

    @property
    def input_name(self) -> str:
        return f"{TOKENS} tokens" if self.size is None else f"{self.size} x {self.size}"

    @property
    def small_input(self) -> str:
        return f"{SMALL_TOKENS} tokens" if self.size is None else f"{self.small_size} x {self.small_size}"

    def inputs(self, num: int, *, full: bool, seed: int = 0) -> Tensor:
        """Return a batch: images (num, 3, size, size), or tokens (num, length)."""
        generator = torch.Generator().manual_seed(seed)
        if self.size is None:
            return torch.randint(VOCABULARY, (num, TOKENS if full else SMALL_TOKENS), generator=generator)
        size = self.size if full else self.small_size
        return torch.rand(num, 3, size, size, generator=generator)

    def loss(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the cross entropy; classes follow from the input, or are the next tokens."""
        output = model(inputs)
        scores = output if isinstance(output, Tensor) else output.logits
        if scores.dim() == 3:
            return F.cross_entropy(scores[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        return F.cross_entropy(scores, (inputs.flatten(1)[:, 0] * CLASSES).long() % CLASSES)


def tv(name: str, small: Callable[[], nn.Module] | None, small_name: str, **options: Any) -> Case:
    full = partial(torchvision.models.get_model, name, weights=None)
    return Case(f"torchvision {name}", full, small or partial(full, num_classes=CLASSES), small_name, **options)


def tm(name: str, small: dict[str, Any], small_name: str, **options: Any) -> Case:
    full = partial(timm.create_model, name, pretrained=False)
    return Case(f"timm {name}", full, partial(full, num_classes=CLASSES, **small), small_name, **options)


def hf(title: str, model: Any, config: Any, small: dict[str, Any], **options: Any) -> Case:
    """Return a case of transformers; `small` replaces entries of the default configuration."""
    small_name = ", ".join(f"{name} {value}" for name, value in small.items() if name not in ("num_labels",))
    return Case(f"Hugging Face {title}", lambda: model(config()), lambda: model(config(**small)), small_name, **options)


def ours(name: str) -> Case:
    """Return a case of this package: a network of the paper, for 32 x 32 images."""
    full = partial(build, name, num_classes=100)
    small = partial(build, name, num_classes=CLASSES, width=4)
    return Case(f"resist {name}", full, small, "width 4", size=32, small_size=16)


def resnet(block: type[BasicBlock | Bottleneck], sections: list[int], **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.ResNet(block, sections, num_classes=CLASSES, **options)


def thin_regnet() -> nn.Module:
    parameters = BlockParams.from_init_params(depth=17, w_0=16, w_a=7.7, w_m=2.19, group_width=8, se_ratio=0.25)
    return RegNet(parameters, num_classes=CLASSES)


def thin_efficientnet() -> nn.Module:
    settings, last = _efficientnet_conf("efficientnet_b4", width_mult=0.35, depth_mult=1.8)
    return torchvision.models.EfficientNet(settings, 0.1, num_classes=CLASSES, last_channel=last)


def thin_convnext() -> nn.Module:
    Setting = torchvision.models.convnext.CNBlockConfig  # noqa: N806
    widths = [(12, 24, 3), (24, 48, 3), (48, 96, 9), (96, None, 3)]
    return torchvision.models.ConvNeXt([Setting(*w) for w in widths], stochastic_depth_prob=0.1, num_classes=CLASSES)


def thin_swin(dim: int = 12) -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], dim, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7], num_classes=CLASSES)


def thin_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 12, 2, 32, 64, num_classes=CLASSES)


def t5(**small: Any) -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**small))


_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_PICTURE = {**_VIT, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
_TEXT = {**_VIT, "vocab_size": VOCABULARY, "num_labels": CLASSES}
_STAGES = {"hidden_sizes": [16, 32, 64, 128], "num_labels": CLASSES}
_TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
_SWIN = {"embed_dim": 12, "num_heads": (1, 2, 4, 8)}
_TIMM_VIT_NAME = "embedding 48, patches of 8"

CASES: tuple[Case, ...] = (
    *map(ours, ("preact_resnet101", "preact_resnet152", "preact_resnet200")),
    tv("resnet18", None, "full width"),
    tv("resnet34", None, "full width"),
    tv("resnet50", resnet(Bottleneck, [3, 4, 6, 3], width_per_group=8), "inner width 8"),
    tv("resnet101", resnet(Bottleneck, [3, 4, 23, 3], width_per_group=8), "inner width 8"),
    tv("resnet152", resnet(Bottleneck, [3, 8, 36, 3], width_per_group=8), "inner width 8"),
    tv("wide_resnet101_2", resnet(Bottleneck, [3, 4, 23, 3], width_per_group=16), "inner width 16"),
    tv("resnext101_32x8d", resnet(Bottleneck, [3, 4, 23, 3], groups=8, width_per_group=4), "8 groups of 4"),
    tv("regnet_y_8gf", thin_regnet, "widths from 16", small_size=64),
    tv("convnext_tiny", thin_convnext, "widths 12 to 96", small_size=64),
    tv("efficientnet_b4", thin_efficientnet, "width 0.35 instead of 1.4", small_size=64),
    tv("mobilenet_v2", partial(torchvision.models.mobilenet_v2, num_classes=CLASSES, width_mult=0.25), "width 0.25"),
    tv("vit_b_16", thin_vit, "embedding 32, patches of 8"),
    tv("swin_t", thin_swin, "embedding 12", small_size=112),
    tv("vgg16_bn", None, ""),
    tv("densenet121", None, ""),
    tv("shufflenet_v2_x1_0", None, "full width", chains=("stage3:1-7",), small_size=64),
    tm("resnetv2_101", {"width_factor": 0.125}, "width 1/8"),
    tm("vit_small_patch16_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("deit_small_patch16_224", {**_TIMM_VIT, "drop_path_rate": 0.1}, _TIMM_VIT_NAME + ", drop path 0.1"),
    tm("vit_small_patch16_rope_mixed_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("beit_base_patch16_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("swin_tiny_patch4_window7_224", _SWIN, "embedding 12", small_size=224),
    replace(
        tm("swin_tiny_patch4_window7_224", _SWIN, "embedding 12", small_size=224, chains=("layers.2.blocks:0-5",)),
        name="timm swin_tiny_patch4_window7_224, its long section",
    ),
    tm("mixer_s32_224", {"img_size": 64}, "full width", small_size=64),
    tm("gmlp_s16_224", {"img_size": 64}, "full width", small_size=64),
    tm("convnextv2_tiny", {"dims": (12, 24, 48, 96)}, "widths 12 to 96", small_size=64),
    tm("caformer_s18", {}, "full width", small_size=64),
    tm("efficientnet_b4", {}, "full width", small_size=64),
    tm("eca_nfnet_l0", {}, "full width", small_size=64),
    tm("regnety_016", {}, ""),
    tm("repvgg_a2", {}, ""),
    hf("ViT", transformers.ViTForImageClassification, transformers.ViTConfig, _PICTURE),
    hf("DeiT", transformers.DeiTForImageClassification, transformers.DeiTConfig, _PICTURE),
    hf("ResNet-50", transformers.ResNetForImageClassification, transformers.ResNetConfig,
       {**_STAGES, "embedding_size": 16}),
    hf("ConvNeXt", transformers.ConvNextForImageClassification, transformers.ConvNextConfig, _STAGES, small_size=64),
    hf("BERT", transformers.BertForSequenceClassification, transformers.BertConfig, _TEXT, size=None),
    hf("DistilBERT", transformers.DistilBertForSequenceClassification, transformers.DistilBertConfig,
       {"dim": 32, "hidden_dim": 64, "n_heads": 2, "vocab_size": VOCABULARY, "num_labels": CLASSES}, size=None),
    hf("ALBERT", transformers.AlbertForSequenceClassification, transformers.AlbertConfig, _TEXT, size=None),
    hf("GPT-2", transformers.GPT2LMHeadModel, transformers.GPT2Config,
       {"n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY}, size=None),
    hf("Llama, 12 layers", transformers.LlamaForCausalLM,
       partial(transformers.LlamaConfig, num_hidden_layers=12, hidden_size=1024, intermediate_size=2816,
               num_attention_heads=16),
       {**_TEXT, "num_key_value_heads": 2}, size=None, chains=("model.layers:0-11",)),
)  # fmt: skip
