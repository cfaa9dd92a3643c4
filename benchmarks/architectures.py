"""The architectures of docs/models.md: as published, and in small versions with equally many blocks.

The libraries are imported where a network is built, since timm and transformers may be missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.efficientnet import _efficientnet_conf
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from reference import main_output
from resist.models import build

CLASSES, VOCABULARY, TOKENS, SMALL_TOKENS = 10, 200, 128, 16
LIBRARIES = {"resist": "resist", "torchvision": "torchvision", "timm": "timm", "Hugging Face": "transformers"}
Inputs = Tensor | dict[str, Tensor]


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
        pairs: The network takes tokens for its encoder and for its decoder.
        outside: The network adds what a block returns to the hidden state.
    """

    name: str
    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    small_name: str
    size: int | None = 224
    small_size: int = 32
    chains: tuple[str, ...] = ()
    pairs: bool = False
    outside: bool = False

    @property
    def library(self) -> str:
        return next(module for title, module in LIBRARIES.items() if self.name.startswith(title))

    @property
    def input_name(self) -> str:
        return f"{TOKENS} tokens" if self.size is None else f"{self.size} x {self.size}"

    @property
    def small_input(self) -> str:
        return f"{SMALL_TOKENS} tokens" if self.size is None else f"{self.small_size} x {self.small_size}"

    def inputs(self, num: int, *, full: bool, seed: int = 0) -> Inputs:
        """Return a batch: images (num, 3, size, size), or tokens (num, length)."""
        generator = torch.Generator().manual_seed(seed)
        if self.size is None:
            tokens = torch.randint(3, VOCABULARY, (num, TOKENS if full else SMALL_TOKENS), generator=generator)
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)} if self.pairs else tokens
        size = self.size if full else self.small_size
        return torch.rand(num, 3, size, size, generator=generator)

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the cross entropy; classes follow from the input, or are the next tokens."""
        scores = main_output(called(model, inputs))
        last = inputs if isinstance(inputs, Tensor) else inputs["decoder_input_ids"]
        if scores.dim() == 3:
            return F.cross_entropy(scores[:, :-1].flatten(0, 1), last[:, 1:].flatten())
        return F.cross_entropy(scores, (last.flatten(1)[:, 0] * CLASSES).long() % CLASSES)


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a network returns for a batch."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def tv(name: str, small: Callable[[], nn.Module] | None, small_name: str, **options: Any) -> Case:
    full = partial(torchvision.models.get_model, name, weights=None)
    return Case(f"torchvision {name}", full, small or partial(full, num_classes=CLASSES), small_name, **options)


def tm(name: str, small: Mapping[str, Any], small_name: str, **options: Any) -> Case:
    """Return a case of timm; `small` are options of the small version."""
    full = partial(_timm, name)
    return Case(f"timm {name}", full, partial(full, num_classes=CLASSES, **small), small_name, **options)


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def hf(
    title: str, model: str, small: Mapping[str, Any], layers: Mapping[str, Any] | None = None, **options: Any
) -> Case:
    """Return a case of transformers.

    Args:
        title: Its name.
        model: Class of the network.
        small: Entries of the configuration that the small version has in place of the default ones.
        layers: Entries that both versions have: fewer layers than the default.
        options: Other attributes of the case.
    """
    small_name = ", ".join(f"{name} {value}" for name, value in small.items() if name not in ("num_labels",))
    full = partial(_transformer, model, **(layers or {}))
    return Case(f"Hugging Face {title}", full, partial(full, **small), small_name, **options)


def _transformer(model: str, **config: Any) -> nn.Module:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    network = getattr(transformers, model)
    return network(network.config_class(**config))


def ours(name: str, **options: Any) -> Case:
    """Return a case of this package: a network of the paper."""
    full = partial(build, name, num_classes=100)
    small = partial(build, name, num_classes=CLASSES, width=4)
    return Case(f"resist {name}", full, small, "width 4", **options)


def resnet(block: type[BasicBlock | Bottleneck], sections: list[int], **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.ResNet(block, sections, num_classes=CLASSES, **options)


def thin_regnet() -> nn.Module:
    depths, widths = [2, 4, 10, 1], [16, 32, 64, 128]
    return RegNet(BlockParams(depths, widths, [8] * 4, [1.0] * 4, [2] * 4, 0.25), num_classes=CLASSES)


def thin_efficientnet() -> nn.Module:
    settings, last = _efficientnet_conf("efficientnet_b4", width_mult=0.35, depth_mult=1.8)
    return torchvision.models.EfficientNet(settings, 0.1, num_classes=CLASSES, last_channel=last)


def thin_convnext(blocks: int) -> nn.Module:
    Setting = torchvision.models.convnext.CNBlockConfig  # noqa: N806
    widths = [(12, 24, 3), (24, 48, 3), (48, 96, blocks), (96, None, 3)]
    return torchvision.models.ConvNeXt([Setting(*w) for w in widths], stochastic_depth_prob=0.1, num_classes=CLASSES)


def thin_swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    return SwinTransformer([4, 4], 12, [2, 2, 6, 2], [1, 2, 4, 8], [8, 8], num_classes=CLASSES,
                           block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)  # fmt: skip


def thin_swin(dim: int = 12) -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], dim, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7], num_classes=CLASSES)


def thin_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 12, 2, 32, 64, num_classes=CLASSES)


_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_PICTURE = {**_VIT, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
_TEXT = {**_VIT, "vocab_size": VOCABULARY, "num_labels": CLASSES}
_DECODER = {
    **_VIT,
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STAGES = {"hidden_sizes": [16, 32, 64, 128], "num_labels": CLASSES}
_SEQ2SEQ = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1, "forced_eos_token_id": None}  # fmt: skip
_TWELVE = {"num_hidden_layers": 12}
_TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
_SWIN = {"embed_dim": 12, "num_heads": (1, 2, 4, 8)}
_TIMM_VIT_NAME = "embedding 48, patches of 8"


def decoder(title: str, model: str, **small: Any) -> Case:
    """Return a case of a language model of 12 layers, with other entries of the small configuration."""
    return hf(f"{title}, 12 layers", f"{model}ForCausalLM", {**_DECODER, **small}, _TWELVE, size=None)


CASES: tuple[Case, ...] = (
    *(ours(name, size=32, small_size=16) for name in ("preact_resnet101", "preact_resnet152", "preact_resnet200")),
    *map(ours, ("preact_resnet50_imagenet", "preact_resnet101_imagenet", "preact_resnet152_imagenet")),
    tv("resnet18", None, "full width"),
    tv("resnet34", None, "full width"),
    tv("resnet50", resnet(Bottleneck, [3, 4, 6, 3], width_per_group=8), "inner width 8"),
    tv("resnet101", resnet(Bottleneck, [3, 4, 23, 3], width_per_group=8), "inner width 8"),
    tv("resnet152", resnet(Bottleneck, [3, 8, 36, 3], width_per_group=8), "inner width 8"),
    tv("wide_resnet101_2", resnet(Bottleneck, [3, 4, 23, 3], width_per_group=16), "inner width 16"),
    tv("resnext101_32x8d", resnet(Bottleneck, [3, 4, 23, 3], groups=8, width_per_group=4), "8 groups of 4"),
    tv("regnet_y_8gf", thin_regnet, "widths from 16", small_size=64),
    tv("convnext_tiny", partial(thin_convnext, 9), "widths 12 to 96", small_size=64),
    tv("efficientnet_b4", thin_efficientnet, "width 0.35 instead of 1.4", small_size=64),
    tv("mobilenet_v2", partial(torchvision.models.mobilenet_v2, num_classes=CLASSES, width_mult=0.25), "width 0.25"),
    tv("vit_b_16", thin_vit, "embedding 32, patches of 8"),
    tv("swin_t", thin_swin, "embedding 12", small_size=112),
    tv("resnext50_32x4d", resnet(Bottleneck, [3, 4, 6, 3], groups=8, width_per_group=4), "8 groups of 4"),
    tv("regnet_x_400mf", None, "full width", small_size=64),
    tv("convnext_small", partial(thin_convnext, 27), "widths 12 to 96", small_size=64),
    tv("efficientnet_v2_s", None, "full width", small_size=64),
    tv("mnasnet1_0", None, "full width", small_size=64),
    tv("mobilenet_v3_large", None, "full width", small_size=64),
    tv("swin_v2_t", thin_swin_v2, "embedding 12", small_size=128),
    tv("vgg16_bn", None, ""),
    tv("densenet121", None, ""),
    tv("shufflenet_v2_x1_0", None, "full width", chains=("stage3:1-7",), small_size=64),
    tm("resnetv2_101", {"width_factor": 0.125}, "width 1/8"),
    tm("vit_small_patch16_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("deit_small_patch16_224", {**_TIMM_VIT, "drop_path_rate": 0.1}, _TIMM_VIT_NAME + ", drop path 0.1"),
    tm("vit_small_patch16_rope_mixed_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("beit_base_patch16_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("swin_tiny_patch4_window7_224", _SWIN, "embedding 12", small_size=224),
    tm("mixer_s32_224", {"img_size": 64}, "full width", small_size=64),
    tm("gmlp_s16_224", {"img_size": 64}, "full width", small_size=64),
    tm("convnextv2_tiny", {"dims": (12, 24, 48, 96)}, "widths 12 to 96", small_size=64),
    tm("caformer_s18", {}, "full width", small_size=64),
    tm("efficientnet_b4", {}, "full width", small_size=64),
    tm("eca_nfnet_l0", {}, "full width", small_size=64),
    tm("deit3_small_patch16_224", _TIMM_VIT, _TIMM_VIT_NAME),
    tm("eva02_tiny_patch14_224", {"img_size": 56}, "full width", small_size=56),
    tm("cait_xxs24_224", {"img_size": 32, "embed_dim": 48, "num_heads": 4, "patch_size": 8}, _TIMM_VIT_NAME),
    tm("xcit_nano_12_p16_224", {"img_size": 64}, "full width", small_size=64),
    tm("resmlp_12_224", {"img_size": 64}, "full width", small_size=64),
    tm("poolformer_s12", {}, "full width", small_size=64),
    tm("inception_next_tiny", {}, "full width", small_size=64),
    tm("resnet50", {}, "full width", small_size=64),
    tm("seresnext50_32x4d", {}, "full width", small_size=64),
    tm("res2net50_26w_4s", {}, "full width", small_size=64),
    tm("nfnet_l0", {}, "full width", small_size=64),
    tm("mobilenetv3_large_100", {}, "full width", small_size=64),
    tm("starnet_s1", {}, "full width", small_size=64),
    tm("pvt_v2_b1", {}, "full width", small_size=64),
    tm("convmixer_768_32", {}, "full width", small_size=64),
    tm("regnety_016", {}, ""),
    tm("repvgg_a2", {}, ""),
    hf("ViT", "ViTForImageClassification", _PICTURE),
    hf("DeiT", "DeiTForImageClassification", _PICTURE),
    hf("BEiT", "BeitForImageClassification", _PICTURE),
    hf("DINOv2", "Dinov2ForImageClassification", {**_PICTURE, "mlp_ratio": 2}),
    hf("Swin", "SwinForImageClassification",
       {"embed_dim": 12, "num_heads": [1, 2, 4, 8], "image_size": 224, "num_labels": CLASSES}, small_size=224),
    hf("ResNet-50", "ResNetForImageClassification", {**_STAGES, "embedding_size": 16}),
    hf("RegNet", "RegNetForImageClassification", {**_STAGES, "embedding_size": 16, "groups_width": 8}, small_size=64),
    hf("ConvNeXt", "ConvNextForImageClassification", _STAGES, small_size=64),
    hf("PoolFormer", "PoolFormerForImageClassification", _STAGES, small_size=64),
    hf("BERT", "BertForSequenceClassification", _TEXT, size=None),
    hf("RoBERTa", "RobertaForSequenceClassification", _TEXT, size=None),
    hf("ELECTRA", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 32}, size=None),
    hf("MPNet", "MPNetForSequenceClassification", _TEXT, size=None),
    hf("DeBERTa-v2, 12 layers", "DebertaV2ForSequenceClassification", _TEXT, _TWELVE, size=None),
    hf("ModernBERT", "ModernBertForSequenceClassification", {**_TEXT, "pad_token_id": 0, "cls_token_id": 1,
       "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, size=None),
    hf("DistilBERT", "DistilBertForSequenceClassification",
       {"dim": 32, "hidden_dim": 64, "n_heads": 2, "vocab_size": VOCABULARY, "num_labels": CLASSES}, size=None),
    hf("ALBERT", "AlbertForSequenceClassification", _TEXT, size=None),
    hf("T5", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2,
       "vocab_size": VOCABULARY}, size=None, pairs=True),
    hf("BART", "BartForConditionalGeneration", _SEQ2SEQ, size=None, pairs=True),
    hf("Pegasus", "PegasusForConditionalGeneration", _SEQ2SEQ, size=None, pairs=True),
    hf("GPT-2", "GPT2LMHeadModel", {"n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY}, size=None),
    hf("GPT-J, 12 layers", "GPTJForCausalLM",
       {"n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "rotary_dim": 8}, {"n_layer": 12}, size=None),
    hf("GPT-NeoX, 12 layers", "GPTNeoXForCausalLM", {**_VIT, "vocab_size": VOCABULARY}, _TWELVE, size=None),
    hf("OPT", "OPTForCausalLM", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2,
       "vocab_size": VOCABULARY}, size=None),
    hf("BLOOM, 12 layers", "BloomForCausalLM", {"hidden_size": 32, "n_head": 2, "vocab_size": VOCABULARY},
       {"n_layer": 12}, size=None),
    hf("Falcon, 12 layers", "FalconForCausalLM", {**_VIT, "vocab_size": VOCABULARY}, _TWELVE, size=None),
    hf("Mamba, 12 layers", "MambaForCausalLM", {"hidden_size": 32, "state_size": 8, "vocab_size": VOCABULARY,
       "time_step_rank": 4}, _TWELVE, size=None),
    *(decoder(title, title.replace(" ", "")) for title in ("Llama", "Mistral", "Qwen2", "Phi3", "Granite")),
    *(decoder(title, title.replace(" ", ""), head_dim=16) for title in ("Qwen3", "Gemma", "Gemma2", "Cohere", "Olmo2")),
    decoder("Mixtral", "Mixtral", num_local_experts=4),
    decoder("Qwen2 MoE", "Qwen2Moe", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
)  # fmt: skip
