"""Models in wrappers of other libraries (PEFT's LoRA) are converted and saved."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers_nets import Cnn, pixels, vit

import quantguard as qg
from quantguard.attacks import logits_of
from quantguard.nn.quant_activation import quantizers

# torchao, which peft imports, has deprecation warnings with this torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def lora(net: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if net == "vit":
            return peft.get_peft_model(vit(), peft.LoraConfig(
                r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"],
                init_lora_weights=False)).eval()
        return peft.get_peft_model(Cnn(), peft.LoraConfig(
            r=2, target_modules=["conv1", "conv2"], modules_to_save=["head"],
            init_lora_weights=False)).eval()


class Delegating(nn.Module):
    """A wrapper that delegates missing attributes to its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@pytest.mark.parametrize(("make", "number"), [
    (functools.partial(lora, "cnn"), 2), (functools.partial(lora, "vit"), 2),
    (lambda: Delegating(Cnn()).eval(), 2), (lambda: Delegating(Delegating(vit())).eval(), 2)],
    ids=["LoRA on a CNN", "LoRA on a ViT", "delegating", "twice"])
def test_wrapped_models_are_converted(make: Callable[[], nn.Module], number: int, tmp_path: Path,
                                      ) -> None:
    """copy.deepcopy must not use the __deepcopy__ of the inner module for the wrapper."""
    torch.manual_seed(0)
    model, x = make(), pixels(32)
    converted = qg.convert(model)
    done = converted.quantguard
    assert done.audit.left == () and done.audit.identical
    assert len(done.plan.converted) == number
    with torch.no_grad():
        answers = logits_of(converted(x))
        copied = copy.deepcopy(converted)
        assert list(quantizers(copied)) == list(quantizers(converted))
        assert copied is not converted and type(copied) is type(converted)
        for other in (copied, pickle.loads(pickle.dumps(converted))):
            assert torch.equal(logits_of(other(x)), answers)
        qg.save(converted, tmp_path / "model.qg")
        torch.manual_seed(0)
        loaded = qg.load(tmp_path / "model.qg", model=make())
        assert torch.equal(logits_of(loaded(x)), answers)
        assert torch.equal(logits_of(qg.restore(converted)(x)), logits_of(model(x)))


def test_adapters_can_be_disabled_after_conversion() -> None:
    converted, x = qg.convert(lora("cnn")), pixels(32)
    with torch.no_grad():
        adapted = converted(x)
        with converted.disable_adapter():
            assert not torch.equal(converted(x), adapted)
        assert torch.equal(converted(x), adapted)


class OwnCopy(Cnn):
    """A net with its own __deepcopy__, which does not know of quantizers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        clone = OwnCopy()
        clone.load_state_dict(self.state_dict(), strict=False)
        return clone.eval()


def test_a_class_that_copies_itself_has_its_quantizers() -> None:
    converted, x = qg.convert(OwnCopy().eval()), pixels(32)
    clone = copy.deepcopy(converted)
    assert list(quantizers(clone)) == list(quantizers(converted))
    with torch.no_grad():
        assert torch.equal(clone(x), converted(x))


def test_a_copy_shares_no_weights_and_a_file_names_no_class_of_ours() -> None:
    converted = qg.convert(Cnn().eval())
    clone = copy.deepcopy(converted)
    clone.conv1.weight.data.zero_()
    assert converted.conv1.weight.any()
    file = io.BytesIO()
    torch.save(converted, file)
    assert b"quantguard Cnn" not in file.getvalue()
