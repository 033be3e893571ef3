"""Apply a plan to a copy of a model, and take it off again."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..core.module_utils import duplicate
from ..core.nested_tensors import device_of
from ..nn.activation_kinds import function_of
from ..nn.quant_activation import HOOKS, QuantActivation, quantizers
from .activation_calls import Identity
from .fx_tracer import separate_aliases
from .module_rewrite import Rewritten, add_input_quantizer, fused_paths, rewrite, undo
from .plan import Plan, Site, join
from .runtime_dispatch import Hook


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of model with the plan's quantizers, whose thresholds are not calibrated."""
    clone = duplicate(model)
    device = device_of(clone)
    by_owner: dict[str, list[Site]] = {}
    for site in plan.sites:
        by_owner.setdefault(site.owner, []).append(site)
    for path, sites in by_owner.items():
        _place_quantizers(clone.get_submodule(path), path, sites, device)
    for module in list(clone.modules()):
        if fused_paths(module) and quantizers(module) and not isinstance(module, Rewritten):
            rewrite(module, type(module), ())
    if plan.input is not None:
        add_input_quantizer(clone, plan.input)
    return clone


def _place_quantizers(owner: nn.Module, path: str, sites: list[Site],
                      device: torch.device) -> None:
    """Give one module the quantizers of its sites, and a forward that calls them."""
    separate_aliases(owner._modules)
    names: dict[Identity, str] = {}
    hooks: list[Hook] = []
    replacements: dict[str, nn.Module] = {}
    targets: dict[str, str] = {}
    taken = {s.target for s in sites if s.converted and s.name == join(path, s.target)}
    for site in sites:
        attribute = site.name[len(path) + 1 :] if path else site.name
        if site.converted:
            assert site.spec is not None
            replacements[attribute] = QuantActivation(
                site.spec, site.function, axis=site.axis, inplace=site.inplace).to(device)
        elif site.target in taken and site.call > 1:
            # A later call that stays float, of a module whose first call is converted.
            replacements[attribute] = copy.deepcopy(site.function)
        elif site.intercepted:
            attribute = ""
        else:
            continue
        if site.target and attribute:
            targets[attribute] = site.target
        if site.intercepted:
            hooks.append(Hook(site.identity, attribute, site.form, site.argument))
            hooks += [Hook(part, "") for part in site.parts]
        elif site.form not in ("opaque", "attribute") and attribute != site.target:
            names[site.identity] = attribute
    called = {attribute: owner._modules.get(target) if "." not in target else
              owner.get_submodule(target) for attribute, target in targets.items()}
    for attribute, module in replacements.items():
        owner.__dict__.pop(attribute, None)  # a function that was stored in an attribute
        _put_child(owner, attribute, module, called.get(attribute))
    if names:
        rewrite(owner, type(owner), tuple(names.items()))
    elif any(hook.attribute for hook in hooks):
        rewrite(owner, type(owner), (), tuple(hooks))


def _put_child(owner: nn.Module, attribute: str, module: nn.Module, old: nn.Module | None) -> None:
    """Set a child, in the mode and with the hooks of the module whose calls it takes over."""
    parent_path, _, name = attribute.rpartition(".")
    module.training = owner.training if old is None else old.training
    if old is not None:
        for hooks in HOOKS:
            getattr(module, hooks).update(getattr(old, hooks))
        module._is_full_backward_hook = old._is_full_backward_hook
    children = owner.get_submodule(parent_path)._modules
    replaced = children.get(name)
    children[name] = module
    for other, child in children.items():
        if replaced is not None and child is replaced:
            children[other] = module  # aliases of one child stay aliases


def remove_plan(clone: nn.Module, plan: Plan | None) -> None:
    """Give a converted model its float activations back, in place.

    Args:
        clone: the converted model.
        plan: the plan it was converted by; None where it is not known.
    """
    before = set(quantizers(clone))
    added = undo(clone)  # this removes the input quantizer
    functions = {site.name: site for site in plan.converted if site.form == "attribute"} \
        if plan is not None else {}
    for path, module in quantizers(clone).items():
        parent_path, _, name = path.rpartition(".")
        parent = clone.get_submodule(parent_path)
        if path in added:
            del parent._modules[name]
            continue
        if path in functions:
            del parent._modules[name]
            setattr(parent, name, function_of(functions[path].kind))
            continue
        function = copy.deepcopy(module.function)
        if hasattr(function, "inplace"):
            setattr(function, "inplace", module.float_inplace)  # noqa: B010 - typed as a Module
        _put_child(parent, name, function, module)
    for path in added - before:  # float copies of calls that were excluded
        parent_path, _, name = path.rpartition(".")
        del clone.get_submodule(parent_path)._modules[name]
