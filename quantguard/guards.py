"""When training has gone wrong, and what is changed before it goes on from where it was well."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .recipes import Recipe

# Returns to an earlier epoch before a run is left as it is.
RETRIES = 3
# Clean accuracy below this share of what the model came with is a wreck.
_WRECKED = 0.6
# Catastrophic overfitting (Wong, Rice, Kolter 2020, arXiv:2001.03994): the training attack alone no
# longer works. It leaves nearly what is right without it, so much more than the probe does, which
# keeps less than this share of it. (A step that is merely short of what many steps do is no such.)
_FOOLED, _SHARE, _NEARLY = 0.15, 0.6, 0.7
# A shorter step than this cannot tell: what is hardly attacked is hardly broken.
_SHORTEST = 0.5
# Certified accuracy that falls below this share of the best so far does not come back by itself.
_COLLAPSED, _WORTH = 0.5, 0.2


@dataclass(frozen=True)
class Remedy:
    """Hold what went wrong, and what training goes on with.

    Attributes:
        reason: what went wrong, as a sentence without its full stop.
        recipe: the recipe from here on.
        lr_factor: what the peak learning rate is multiplied by.
        restart: whether to go back to the start, instead of the best epoch.
    """

    reason: str
    recipe: Recipe
    lr_factor: float = 1.0
    restart: bool = False

    @property
    def said(self) -> str:
        """Return what is done about it."""
        done = [f"lr times {self.lr_factor:g}"] * (self.lr_factor != 1)
        if self.recipe.attacks:
            done.append(f"inner step {self.recipe.rel_step:g} eps, noise {self.recipe.noise:g} eps")
        return ", ".join(done)


def smaller_step(recipe: Recipe) -> Recipe:
    """Return the recipe with half the inner step, and noise of eps at least."""
    return replace(recipe, rel_step=(recipe.rel_step or 0.0) / 2, noise=max(recipe.noise or 0, 1.0))


def one_step(recipe: Recipe) -> bool:
    """Return whether the inner attack is one that a model can learn to fool: a single step."""
    return recipe.steps == 1


def remedy(recipe: Recipe, start: float | None, clean: float | None, attacked: float | None,
           own: float | None, first: bool) -> Remedy | None:
    """Return what to do after an epoch; None: nothing is wrong.

    Args:
        recipe: the present one.
        start: held-out clean accuracy before training; None: no held-out slice.
        clean, attacked: those of this epoch.
        own: accuracy under the recipe's own inner attack; None: not measured.
        first: whether this is the first epoch.
    """
    if clean is None or attacked is None or start is None:
        return None
    if own is not None and (recipe.rel_step or 0) > _SHORTEST and own > _NEARLY * clean \
            and own - attacked > _FOOLED and attacked < _SHARE * own:
        return Remedy(f"the training attack leaves {own:.1%} and the probe {attacked:.1%} "
                      "(catastrophic overfitting)", smaller_step(recipe))
    if clean < _WRECKED * start:
        reason = f"clean accuracy fell from {start:.1%} to {clean:.1%}"
        if recipe.attacks and (recipe.rel_step or 0) > 1:
            return Remedy(reason, smaller_step(recipe), restart=True)
        if first and recipe.lr is None:
            return Remedy(f"{reason} in the first epoch", recipe, 0.2, restart=True)
    return None


def collapsed(recipe: Recipe, best: float, certified: float | None) -> Remedy | None:
    """Return what to do where certified training has lost most of what it could certify.

    Args:
        best: the largest share of held-out images that an earlier epoch certified.
        certified: that of this epoch; None: no held-out slice.
    """
    if certified is None or best < _WORTH or certified >= _COLLAPSED * best:
        return None
    return Remedy(f"certified accuracy fell from {best:.1%} to {certified:.1%}", recipe, 0.5)
