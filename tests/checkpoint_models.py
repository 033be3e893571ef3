"""Models for tests of .qg files, and the comparison of a model with its file."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import quantizers

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True),
                         nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)),
                         nn.Linear(8, 3))


def tied() -> nn.Sequential:
    model = sequential()
    model[3].append(nn.Linear(8, 8))
    model[3][3].weight = model[3][0].weight
    return model


def moved(model: nn.Module) -> nn.Module:
    """Change every parameter, including learned thresholds, and the running means."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.add_(0.5)
    return model


def assert_same(ours: nn.Module, other: nn.Module, x: Tensor) -> None:
    first, second = ours.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert [(n, m.training) for n, m in ours.named_modules()] == [
        (n, m.training) for n, m in other.named_modules()]
    assert conversion_of(ours) == conversion_of(other)
    for name, quantizer in quantizers(ours).items():
        assert quantizers(other)[name].spec == quantizer.spec
    pair = copy.deepcopy(ours).eval(), copy.deepcopy(other).eval()
    assert torch.equal(pair[0](x), pair[1](x))
    with bypass(pair[0]), bypass(pair[1]):
        assert torch.equal(pair[0](x), pair[1](x))
