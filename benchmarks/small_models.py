"""Small random models of other libraries: no download, next to no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

CLASSES = 3
_VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 37, "image_size": 32, "patch_size": 8}
_PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_MIX: dict[str, Any] = {**_PYRAMID, "num_attention_heads": [1, 2, 2, 2]}
_SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2],
                         "num_heads": [2, 2], "window_size": 2}
_FOCAL: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16,
                          "hidden_sizes": [16, 32], "depths": [1, 1], "focal_levels": [2, 2],
                          "focal_windows": [3, 3]}
_DINO: dict[str, Any] = {**_VIT, "mlp_ratio": 2}
_RES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
_PERCEIVER: dict[str, Any] = {"num_latents": 8, "d_latents": 16, "d_model": 16,
                              "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
                              "num_cross_attention_heads": 1, "image_size": 32}
_TEXT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37,
                         "num_hidden_layers": 2, "num_attention_heads": 2}
_EFFICIENT: dict[str, Any] = {
    "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 5],
    "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
    "num_block_repeats": [1, 2], "expand_ratios": [1, 2], "hidden_dim": 32}

# Name of the configuration -> settings of a small one, or several by a word that tells them apart.
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
    "shieldgemma2": {"": {
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


def huggingface() -> dict[str, Callable[[], nn.Module]]:
    """Return a builder for every image classifier that transformers lists, and some variants."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    def building(kind: str, name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            config = transformers.AutoConfig.for_model(kind, **settings)
            config.num_labels = CLASSES
            model: nn.Module = getattr(transformers, name)(config)
            return model.eval()
        return build

    found = {}
    for kind, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            for word, settings in SETTINGS[kind].items():
                found[f"{name} {word}".strip()] = building(kind, name, settings)
    return found
