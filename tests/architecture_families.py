"""Small networks of many families of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.layers import GatedMlp
from timm.models import byoanet, byobnet, dla, metaformer, mlp_mixer, mobilevit, mvitv2
from torch import nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.quantization import resnet as quantizable
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video import resnet as video
from torchvision.models.video.mvit import MSBlockConfig, MViT

Build = Callable[[], nn.Module]
TEN = {"num_classes": 10}
# Stochastic depth, if a family has it: a graph must not fix its random choice.
DROPS: dict[str, Any] = {"num_classes": 10, "drop_path_rate": 0.2}
FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), **DROPS}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, **DROPS}


def of_timm(name: str, **options: Any) -> Build:
    return partial(timm.create_model, name, pretrained=False, **options)


def of_blocks(name: str, **options: Any) -> Build:
    """Build a network of timm that is defined by blocks, with one block per stage."""
    blocks = (byobnet.model_cfgs | byoanet.model_cfgs)[name].blocks
    return of_timm(name, blocks=[
        replace(stage, d=1) if isinstance(stage, byobnet.ByoBlockCfg) else stage
        for stage in blocks], **DROPS, **options)


def lraspp() -> nn.Module:
    features = models.mobilenet_v3_small(width_mult=0.5).features
    body = IntermediateLayerGetter(features, {"3": "low", "12": "high"})
    return LRASPP(body, features[3].out_channels, features[12].out_channels, inter_channels=32,
                  **TEN)


def fcn() -> nn.Module:
    body = IntermediateLayerGetter(models.ResNet(BasicBlock, [1, 1, 1, 1]),
                                   {"layer3": "aux", "layer4": "out"})
    return FCN(body, FCNHead(512, 10), FCNHead(256, 10))


def mobilevit_() -> nn.Module:
    first, second, (third, attention), *_ = mobilevit.model_cfgs["mobilevit_xxs"].blocks
    return timm.create_model("mobilevit_xxs", **DROPS, blocks=[
        first, replace(second, d=1), (third, attention)])


def poolformer() -> nn.Module:
    return timm.models.MetaFormer(
        dims=(16, 32, 48, 64), downsample_norm=None, mlp_act=nn.GELU, mlp_bias=True,
        norm_layers=metaformer.GroupNorm1, use_mlp_head=False, **FOUR)


def caformer() -> nn.Module:
    mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    return timm.models.MetaFormer(dims=(32, 32, 64, 64), token_mixers=mixers, norm_layers=norms,
                                  **FOUR)


RGB, LARGER = (3, 32, 32), (3, 64, 64)
# family: (constructor of a small model, shape of an image, activations that are quantized)
FAMILIES: dict[str, tuple[Build, tuple[int, ...], str]] = {
    "resnet": (partial(models.resnet18, **TEN), RGB, "relu"),
    "mobilenet_v2": (partial(models.mobilenet_v2, width_mult=0.25, **TEN), RGB, "relu6"),
    "mobilenet_v3": (partial(models.mobilenet_v3_small, width_mult=0.5, **TEN), RGB,
                     "hardswish relu"),
    "efficientnet": (partial(models.EfficientNet, [
        FusedMBConvConfig(4, 3, 1, 16, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(6, 5, 2, 24, 32, 1)], 0.2, 0.2, num_classes=10), RGB, "silu"),
    "densenet": (partial(models.DenseNet, 8, (2, 2, 2, 2), 16, drop_rate=0.1, **TEN), RGB, "relu"),
    "checkpointed": (partial(
        models.DenseNet, 8, (2, 2), 16, memory_efficient=True, **TEN), RGB, "relu"),
    "googlenet": (partial(models.googlenet, init_weights=False, **TEN), RGB, "relu"),
    "squeezenet": (partial(models.squeezenet1_1, **TEN), RGB, "relu"),
    "shufflenet": (partial(models.shufflenet_v2_x0_5, **TEN), RGB, "relu"),
    "regnet": (partial(models.RegNet, BlockParams(
        [1, 2, 1], [16, 32, 48], [8, 8, 8], [1.0] * 3, [2, 2, 2], 0.25), **TEN), RGB, "relu"),
    "convnext": (partial(models.ConvNeXt, [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)],
                         0.2, **TEN), RGB, "gelu"),
    "swin": (partial(models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4],
                     stochastic_depth_prob=0.2, **TEN), RGB, "gelu"),
    "swin v2": (partial(models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4],
                        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **TEN), RGB,
                "gelu relu"),
    "vit": (partial(models.VisionTransformer, 32, 8, 2, 2, 32, 64, 0.1, 0.1, num_classes=10), RGB,
            "gelu"),
    "maxvit": (partial(models.MaxVit, (64, 64), 16, 2, [16, 32], [1, 1], 8, 0.2, num_classes=10),
               LARGER, "gelu silu tanh"),
    "lraspp": (lraspp, RGB, "hardswish relu"),
    "fcn": (fcn, RGB, "relu"),
    "mc3": (partial(video.VideoResNet, video.BasicBlock,
                    [video.Conv3DSimple] + [video.Conv3DNoTemporal] * 3, [1, 1, 1, 1],
                    video.BasicStem, **TEN), (3, 2, 16, 16), "relu"),
    "mvit": (partial(MViT, (32, 32), 4, [
        MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 4, 4]),
        MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2])],
        True, False, False, False, **TEN), (3, 4, 32, 32), "gelu"),
    "quantizable resnet": (partial(quantizable.QuantizableResNet, quantizable.QuantizableBasicBlock,
                                   [1, 1, 1, 1], **TEN), RGB, "relu"),
    "resnet-t": (of_timm("resnet10t", drop_block_rate=0.1, **DROPS), RGB, "relu"),
    "resnetv2": (of_timm("resnetv2_18", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), **DROPS),
                 RGB, "relu"),
    "vit_tiny": (of_timm("vit_tiny_patch16_224", attn_drop_rate=0.1, **VIT), RGB, "gelu"),
    "deit": (of_timm("deit_tiny_distilled_patch16_224", **VIT), RGB, "gelu"),
    "beit": (of_timm("beit_base_patch16_224", embed_dim=64, num_heads=2, **VIT), RGB, "gelu"),
    "eva02": (of_timm("eva02_tiny_patch14_224", embed_dim=64, num_heads=2, **VIT), RGB, "silu"),
    "vit with resnet": (of_timm("vit_tiny_r_s16_p8_224", img_size=32, depth=1, **DROPS), RGB,
                        "gelu relu"),
    "naflexvit": (of_timm("naflexvit_base_patch16_gap", embed_dim=64, num_heads=2, depth=2,
                          **DROPS), RGB, "gelu"),
    "cait": (of_timm("cait_xxs24_224", **VIT), RGB, "gelu"),
    "convit": (of_timm("convit_tiny", local_up_to_layer=1, **VIT), RGB, "gelu"),
    "crossvit": (of_timm("crossvit_tiny_240", img_size=48, img_scale=(1.0, 2 / 3),
                         patch_size=(12, 16), depth=[[1, 1, 0]], **DROPS), (3, 48, 48), "gelu"),
    "swin_tiny": (of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24,
                          num_heads=(1, 2, 4, 8), **FOUR), RGB, "gelu"),
    "swinv2_cr": (of_timm("swinv2_cr_tiny_224", img_size=64, embed_dim=24, num_heads=(1, 2, 4, 8),
                          **FOUR), LARGER, "gelu relu"),
    "twins": (of_timm("twins_svt_small", img_size=32, embed_dims=(16, 32, 48, 64),
                      num_heads=(1, 2, 3, 4), **FOUR), RGB, "gelu"),
    "pit": (of_timm("pit_ti_224", img_size=64, depth=(1, 1, 1), **DROPS), LARGER, "gelu"),
    "tnt": (of_timm("tnt_s_patch16_224", img_size=32, embed_dim=96, depth=2, **DROPS), RGB, "gelu"),
    "mixer": (partial(timm.models.MlpMixer, img_size=32, num_blocks=2, embed_dim=32, **DROPS), RGB,
              "gelu"),
    "gmlp": (partial(timm.models.MlpMixer, img_size=32, num_blocks=2, embed_dim=32, mlp_ratio=4,
                     block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, **DROPS), RGB,
             "gelu"),
    "resmlp": (partial(timm.models.MlpMixer, img_size=32, num_blocks=2, embed_dim=32, mlp_ratio=4,
                       block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **DROPS), RGB,
               "gelu"),
    "convmixer": (partial(timm.models.ConvMixer, 64, 2, **TEN), RGB, "gelu"),
    "convnext_atto": (of_timm("convnext_atto", dims=(16, 24, 32, 48), **FOUR), RGB, "gelu"),
    "convnextv2": (of_timm("convnextv2_atto", dims=(16, 24, 32, 48), **FOUR), RGB, "gelu"),
    "edgenext": (of_timm("edgenext_xx_small", **FOUR), LARGER, "gelu"),
    "ghostnet": (partial(timm.models.GhostNet, [
        [[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2]], [[5, 72, 40, 0.25, 2]]], **TEN), RGB, "relu"),
    "levit": (of_timm("levit_128s", img_size=64, depth=(1, 1, 1), embed_dim=(32, 48, 64),
                      num_heads=(2, 3, 4), **DROPS), LARGER, "hardswish"),
    "coatnet": (of_timm("coatnet_nano_rw_224", img_size=32, embed_dim=(16, 32, 64, 64),
                        stem_width=16, **FOUR), RGB, "gelu silu"),
    "mobilevit": (mobilevit_, RGB, "silu"),
    "eca_nfnet": (of_timm("eca_nfnet_l0", channels=(32, 32, 64, 64), stem_chs=16, group_size=8,
                          num_features=64, **FOUR), RGB, "silu"),
    "dm_nfnet": (of_timm("dm_nfnet_f0", channels=(32, 32, 64, 64), stem_chs=16, group_size=8,
                         num_features=64, **FOUR), RGB, "gelu relu"),
    "poolformer": (poolformer, RGB, "gelu"),
    "caformer": (caformer, RGB, "relu"),
    "pvt_v2": (of_timm("pvt_v2_b0", **FOUR), RGB, "gelu"),
    "repvgg": (of_blocks("repvgg_a0", width_factor=0.25), RGB, "relu"),
    "sequencer": (of_timm("sequencer2d_s", img_size=56, layers=(1, 1, 1, 1), **DROPS,
                          embed_dims=(32, 64, 64, 64), hidden_sizes=(8, 16, 16, 16)), (3, 56, 56),
                  "gelu"),
    "visformer": (of_timm("visformer_tiny", img_size=64, embed_dim=64, depth=(1, 1, 1),
                          init_channels=8, num_heads=2, **DROPS), LARGER, "gelu relu"),
    "volo": (partial(timm.models.VOLO, (1, 1, 1, 1), 64, embed_dims=(32, 64, 64, 64),
                     num_heads=(2, 4, 4, 4), **DROPS), LARGER, "gelu relu"),
    "xcit": (of_timm("xcit_nano_12_p16_224", img_size=32, depth=2, **DROPS), RGB, "gelu"),
    "hiera": (of_timm("hiera_tiny_224", img_size=(32, 32), stages=(1, 1, 1, 1), embed_dim=32,
                      **DROPS), RGB, "gelu"),
    "starnet": (of_timm("starnet_s050", **DROPS), RGB, "relu6"),
    "mambaout": (of_timm("mambaout_femto", dims=(16, 32, 48, 64), **FOUR), RGB, "gelu"),
    "dla": (partial(timm.models.DLA, (1, 1, 1, 2, 1, 1), (16, 16, 32, 32, 48, 64),
                    block=dla.DlaBottleneck, **TEN), RGB, "relu"),
    "halonet": (of_blocks("halonet26t", width_factor=0.25, self_attn_kwargs={
        "block_size": 2, "halo_size": 1}), LARGER, "relu"),
    "lambdanet": (of_blocks("lambda_resnet26t", img_size=64, width_factor=0.25,
                            self_attn_kwargs={"r": 3}), LARGER, "relu"),
    "focalnet": (partial(timm.models.FocalNet, embed_dim=24, **FOUR), RGB, "gelu"),
    "tiny_vit": (of_timm("tiny_vit_5m_224", embed_dims=(32, 32, 64, 64), num_heads=(1, 1, 2, 2),
                         **FOUR), LARGER, "gelu"),
    "fasternet": (of_timm("fasternet_t0", **FOUR), RGB, "gelu"),
    "mvitv2": (partial(mvitv2.MultiScaleVit, mvitv2.MultiScaleVitCfg(
        depths=(1, 1, 1, 1), embed_dim=24, num_heads=1), (32, 32), **DROPS), RGB, "gelu"),
    "tresnet": (of_timm("tresnet_m", layers=(1, 1, 1, 1), width_factor=0.5, **DROPS), RGB,
                "leaky_relu relu"),
    "samvit": (of_timm("samvit_base_patch16_224", img_size=64, depth=2, embed_dim=64, num_heads=2,
                       global_attn_indexes=(1,), **DROPS), LARGER, "gelu"),
}
