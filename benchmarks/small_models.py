"""Small random models of other libraries: no download, a fraction of a second each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
_VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 37, "image_size": 32, "patch_size": 8}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_MIX: dict[str, Any] = {**_PYRAMID, "num_attention_heads": [1, 2, 2, 2]}
_SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
                         "num_heads": [2, 2], "window_size": 2}
_FOCAL: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16,
                          "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2],
                          "focal_windows": [3, 3]}
_DINO: dict[str, Any] = {**_VIT, "mlp_ratio": 2}
_RES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
_PERCEIVER: dict[str, Any] = {"num_latents": 8, "d_latents": 16, "d_model": 16,
                              "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
                              "num_cross_attention_heads": 1, "image_size": 16}
_TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37,
                         "num_hidden_layers": 2, "num_attention_heads": 2}
_EFFICIENT: dict[str, Any] = {
    "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 5],
    "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
    "num_block_repeats": [1, 2], "expand_ratios": [1, 2], "hidden_dim": 1280}

# Configuration name -> settings of a small one, or of several by a distinguishing word.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "beit": {"": _VIT, "relative": {**_VIT, "use_relative_position_bias": True,
                                    "use_absolute_position_embeddings": True}},
    "bit": {"": {**_RES, "num_groups": 2},
            "bottleneck": {**_RES, "num_groups": 2, "layer_type": "bottleneck"}},
    "clip": {"": {"vision_config": _VIT, "text_config": _TEXT}},
    "convnext": {"": {**_PYRAMID, "image_size": 32}},
    "convnextv2": {"": {**_PYRAMID, "image_size": 32}},
    "cvt": {"": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}},
    "data2vec-vision": {"": _VIT, "shared": {**_VIT, "use_shared_relative_position_bias": True}},
    "deit": {"": _VIT},
    "dinat": {"": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                   "dilations": [[1], [1]], "kernel_size": 3}},
    "dinov2": {"": _DINO, "swiglu": {**_DINO, "use_swiglu_ffn": True}},
    "dinov2_with_registers": {"": _DINO, "swiglu": {**_DINO, "use_swiglu_ffn": True}},
    "donut-swin": {"": _SWIN},
    "efficientnet": {"": _EFFICIENT},
    "focalnet": {"": _FOCAL, "conv": {**_FOCAL, "use_conv_embed": True, "use_layerscale": True,
                                      "use_post_layernorm": True, "normalize_modulator": True}},
    "hgnet_v2": {"": {"embedding_size": 8, "hidden_sizes": [16, 16, 16, 16],
                      "depths": [1, 1, 1, 1], "stem_channels": [3, 4, 8],
                      "stage_in_channels": [8, 16, 16, 16], "stage_mid_channels": [8, 8, 8, 8],
                      "stage_out_channels": [16, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1],
                      "stage_numb_of_layers": [2, 2, 2, 2]},
                 "affine": {"embedding_size": 8, "hidden_sizes": [16, 16, 16, 16],
                            "depths": [1, 1, 1, 1], "stem_channels": [3, 4, 8],
                            "stage_in_channels": [8, 16, 16, 16],
                            "stage_mid_channels": [8, 8, 8, 8],
                            "stage_out_channels": [16, 16, 16, 16],
                            "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
                            "use_learnable_affine_block": True}},
    "hiera": {"": {"embed_dim": 16, "image_size": [32, 32], "depths": [1, 1, 1],
                   "num_heads": [1, 2, 2], "masked_unit_size": [4, 4], "num_query_pool": 2,
                   "masked_unit_attention": [True, False, False], "patch_stride": [4, 4]}},
    "ijepa": {"": _VIT},
    "imagegpt": {"": {"vocab_size": 17, "n_positions": 64, "n_embd": 32, "n_layer": 2,
                      "n_head": 2}},
    "levit": {"": {"image_size": 64, "hidden_sizes": [16, 24, 32],
                   "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
                   "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]}},
    "metaclip_2": {"": {"vision_config": _VIT, "text_config": _TEXT}},
    "mobilenet_v1": {"": {"image_size": 32, "depth_multiplier": 0.25}},
    "mobilenet_v2": {"": {"image_size": 32, "depth_multiplier": 0.25}},
    "mobilevit": {"": {"image_size": 32, "hidden_sizes": [12, 16, 20], "num_attention_heads": 2,
                       "neck_hidden_sizes": [4, 4, 8, 8, 12, 12, 16]}},
    "mobilevitv2": {"": {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1],
                         "base_attn_unit_dims": [32, 32, 32]}},
    "perceiver": {"": _PERCEIVER},
    "poolformer": {"": _PYRAMID},
    "pp_lcnet": {"": {"scale": 0.25, "class_expand": 32}},
    "pvt": {"": {**_MIX, "image_size": 64}},
    "pvt_v2": {"": {**_MIX, "image_size": 64},
               "linear": {**_MIX, "image_size": 64, "linear_attention": True}},
    "regnet": {"": {**_RES, "groups_width": 4}, "x": {**_RES, "groups_width": 4,
                                                      "layer_type": "x"}},
    "resnet": {"": _RES, "basic": {**_RES, "layer_type": "basic"}},
    "segformer": {"": _MIX},
    "shieldgemma2": {"": {"yes_token_index": 9, "no_token_index": 11,
        "vision_config": {**_VIT, "vision_use_head": False}, "mm_tokens_per_image": 4,
        "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7,
        "text_config": {**_TEXT, "num_key_value_heads": 1, "head_dim": 16,
                        "layer_types": ["sliding_attention", "full_attention"]}}},
    "siglip": {"": {"vision_config": _VIT, "text_config": _TEXT}},
    "siglip2": {"": {"vision_config": {k: v for k, v in _VIT.items() if k != "image_size"}
                     | {"num_patches": 16}, "text_config": _TEXT}},
    "swiftformer": {"": {"depths": [1, 1, 1, 2], "embed_dims": [8, 16, 16, 24], "image_size": 64}},
    "swin": {"": _SWIN, "absolute": {**_SWIN, "use_absolute_embeddings": True}},
    "swinv2": {"": _SWIN},
    "textnet": {"": {"image_size": [64, 64], "stem_out_channels": 8,
                     "hidden_sizes": [8, 8, 16, 16, 24]}},
    "timm_wrapper": {name: {"architecture": name, "model_args": args} for name, args in {
        "resnet10t": {}, "lcnet_050": {},
        "vit_tiny_patch16_224": {"img_size": 32, "depth": 2}}.items()},
    "vit": {"": _VIT, "relu": {**_VIT, "hidden_act": "relu"},
            "quick_gelu": {**_VIT, "hidden_act": "quick_gelu"},
            "gelu_new": {**_VIT, "hidden_act": "gelu_new"}},
    "vit_msn": {"": _VIT},
}


class Tokens(nn.Module):
    """Classify images by ImageGPT, which reads a token for each pixel: its nearest color."""

    image_size = 8

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        colors = torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("colors", colors)

    def forward(self, pixels: Tensor) -> Any:
        flat = pixels.flatten(2).transpose(1, 2)
        return self.model((flat.unsqueeze(2) - self.colors).square().sum(3).argmin(2))


class Patches(nn.Module):
    """Classify images by SigLIP 2, which reads patches in a row and their layout."""

    image_size = 32

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        side = self.model.config.vision_config.patch_size
        rows = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
        n, high, wide = rows.shape[:3]
        return self.model(rows.reshape(n, high * wide, -1),
                          torch.ones(n, high * wide, dtype=torch.long, device=pixels.device),
                          torch.tensor([[high, wide]] * n, device=pixels.device))


class Prompt(nn.Module):
    """Classify images by ShieldGemma 2, which reads a text with each."""

    image_size = 32

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        image = [model.config.image_token_index] * model.config.mm_tokens_per_image
        self.register_buffer("text", torch.tensor([*image, 9, 10, 11]))

    def forward(self, pixels: Tensor) -> Any:
        return self.model(self.text.expand(len(pixels), -1), pixels)


# Wrappers that turn images into the inputs of models that read something else.
AROUND = {"ImageGPTForImageClassification": Tokens, "Siglip2ForImageClassification": Patches,
          "ShieldGemma2ForImageClassification": Prompt}


def huggingface() -> dict[str, Callable[[], nn.Module]]:
    """Return a builder for every image classifier that transformers lists, and some variants."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    def building(kind: str, name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            config = transformers.AutoConfig.for_model(kind, **settings)
            config.num_labels = CLASSES
            model: nn.Module = getattr(transformers, name)(config)
            return (AROUND[name](model) if name in AROUND else model).eval()
        return build

    found = {}
    for kind, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            for word, settings in SETTINGS[kind].items():
                found[f"{name} {word}".strip()] = building(kind, name, settings)
    return found



class Head(nn.Module):
    """Classify by the features of an encoder: its last map, or one vector per image."""

    def __init__(self, encoder: nn.Module, channels: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(channels, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.encoder(pixels)
        last = features[-1] if isinstance(features, (list, tuple)) else features
        return self.head(last.mean((2, 3)) if last.dim() == 4 else last)


class Cnn(nn.Module):
    """Small network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).relu().mean((2, 3)))


def peft() -> dict[str, Callable[[], nn.Module]]:
    """Return builders of networks wrapped by PEFT: each kind of adapter, several networks."""
    import peft
    import timm

    nets: dict[str, Callable[[], nn.Module]] = {
        "ViT": huggingface()["ViTForImageClassification"],
        "ResNet": huggingface()["ResNetForImageClassification"],
        "timm resnet": lambda: timm.create_model("resnet18", num_classes=CLASSES),
        "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32,
                                              num_classes=CLASSES),
        "CNN": Cnn}
    linear: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "fc1"],
                              "modules_to_save": ["classifier"]}
    convs: dict[str, Any] = {"target_modules": ["conv1", "conv2"], "r": 2}
    adapters: dict[str, tuple[str, Any]] = {
        "LoRA": ("ViT", peft.LoraConfig(r=2, lora_dropout=0.1, **linear)),
        "DoRA": ("ViT", peft.LoraConfig(r=2, use_dora=True, **linear)),
        "LoRA all linear": ("ViT", peft.LoraConfig(r=2, target_modules="all-linear")),
        "AdaLoRA": ("ViT", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **linear)),
        "LoHa": ("ViT", peft.LoHaConfig(r=2, **linear)),
        "LoKr": ("ViT", peft.LoKrConfig(r=2, **linear)),
        "IA3": ("ViT", peft.IA3Config(**linear, feedforward_modules=["fc1"])),
        "OFT": ("ViT", peft.OFTConfig(r=0, oft_block_size=4, **linear)),
        "VeRA": ("ViT", peft.VeraConfig(r=2, target_modules=["q_proj", "v_proj"])),
        "LoRA ": ("ResNet", peft.LoraConfig(r=2, target_modules=["convolution"])),
        "LoRA  ": ("timm resnet", peft.LoraConfig(**convs, modules_to_save=["fc"])),
        "LoHa ": ("timm resnet", peft.LoHaConfig(**convs)),
        "LoRA   ": ("timm vit", peft.LoraConfig(r=2, target_modules=["qkv", "fc1", "fc2"])),
        "LoRA    ": ("CNN", peft.LoraConfig(**convs, modules_to_save=["head"]))}

    def building(net: str, config: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            model: nn.Module = peft.get_peft_model(nets[net](), copy.deepcopy(config))
            return model.eval()
        return build

    return {f"{name.strip()} on {net}": building(net, config)
            for name, (net, config) in adapters.items()}


def smp() -> dict[str, Callable[[], nn.Module]]:
    """Return builders of classifiers: one encoder of each family, and a net with two outputs."""
    import segmentation_models_pytorch as smp

    def building(name: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            encoder = smp.encoders.get_encoder(name, weights=None)
            return Head(encoder, encoder.out_channels[-1]).eval()
        return build

    return {name: building(name) for name in (
        "resnet18", "resnext50_32x4d", "dpn68", "vgg11", "vgg11_bn", "se_resnet50", "densenet121",
        "inceptionresnetv2", "inceptionv4", "efficientnet-b0", "mobilenet_v2", "xception",
        "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-skresnet18", "mit_b0",
        "mobileone_s0", "tu-resnet18", "tu-convnext_atto", "tu-mobilenetv3_small_050")}


def open_clip() -> dict[str, Callable[[], nn.Module]]:
    """Return builders of classifiers: one small vision encoder of each family."""
    from open_clip import model as clip

    small = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    towers: dict[str, tuple[dict[str, Any], bool]] = {
        "ViT": (small, False), "ViT quickgelu": (small, True),
        "ViT CoCa": ({**small, "attentional_pool": True, "attn_pooler_heads": 2}, False),
        "ViT CLIPA": ({**small, "pool_type": "avg", "final_ln_after_pool": True,
                       "pos_embed_type": "sin_cos_2d"}, False),
        "ViT layer scale, patch dropout": ({**small, "ls_init_value": 1e-4,
                                            "patch_dropout": 0.5}, False),
        "RN": ({"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16}, False),
        **{f"timm {name}": ({"image_size": size, "timm_model_name": name, "timm_pool": pool,
                             "timm_proj": projection}, False)
           for name, size, pool, projection in (
               ("convnext_atto", 64, "", "linear"),
               ("vit_tiny_patch16_224", 224, "token", "linear"),
               ("eva02_tiny_patch14_224", 28, "token", "linear"),
               ("fastvit_t8", 64, "avg", None), ("vitamin_small_224", 64, "avg", "linear"),
               ("swin_tiny_patch4_window7_224", 224, "avg", "mlp"))}}

    def building(settings: dict[str, Any], quick: bool) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            return Head(clip._build_vision_tower(16, dict(settings), quick_gelu=quick), 16).eval()
        return build

    return {name: building(settings, quick) for name, (settings, quick) in towers.items()}
