"""Recovery: detects that training has failed, and chooses the settings to resume with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .recipes import Recipe

# Number of times that a run returns to an earlier epoch.
RETRIES = 3
# Clean accuracy below this share of the model's accuracy before training counts as lost.
_WRECKED = 0.6
# Catastrophic overfitting (Wong, Rice, Kolter 2020, arXiv:2001.03994): the training attack no
# longer works. Accuracy under it is nearly the clean accuracy, and much higher than under the
# validation attack, which leaves less than this share of it. Otherwise a single step is merely
# weaker than many steps, which is normal.
_FOOLED, _SHARE, _NEARLY = 0.15, 0.6, 0.7
# Shorter steps than this show nothing: a weak attack breaks few images of any model.
_SHORTEST = 0.5
# Certified accuracy that falls below this share of the best so far does not recover by itself.
_COLLAPSED, _WORTH = 0.5, 0.2


@dataclass(frozen=True)
class Remedy:
    """What went wrong, and the settings that training resumes with.

    Attributes:
        reason: what went wrong, as a sentence without its full stop.
        recipe: the recipe from here on.
        lr_factor: factor of the peak learning rate.
        restart: whether to return to the start instead of the best epoch.
    """

    reason: str
    recipe: Recipe
    lr_factor: float = 1.0
    restart: bool = False

    @property
    def changes(self) -> str:
        """The changed settings, as text."""
        changed = [f"lr times {self.lr_factor:g}"] if self.lr_factor != 1 else []
        if self.recipe.attacks:
            changed.append(f"inner step {self.recipe.rel_step:g} eps, "
                           f"noise {self.recipe.noise:g} eps")
        return ", ".join(changed)


def smaller_step(recipe: Recipe) -> Recipe:
    """Return the recipe with half the inner step, and noise of at least eps."""
    return replace(recipe, rel_step=(recipe.rel_step or 0.0) / 2, noise=max(recipe.noise or 0, 1.0))


def one_step(recipe: Recipe) -> bool:
    """Return whether the inner attack is a single step, which a model can learn to evade."""
    return recipe.steps == 1


def remedy(recipe: Recipe, start: float | None, clean: float | None, attacked: float | None,
           own: float | None, first: bool) -> Remedy | None:
    """Return what to change after an epoch; None: nothing is wrong.

    Args:
        recipe: the present one.
        start: held-out clean accuracy before training; None: there is no held-out slice.
        clean, attacked: held-out accuracies after this epoch.
        own: accuracy under the recipe's own inner attack; None: not measured.
        first: whether this is the first epoch.
    """
    if clean is None or attacked is None or start is None:
        return None
    if own is not None and (recipe.rel_step or 0) > _SHORTEST and own > _NEARLY * clean \
            and own - attacked > _FOOLED and attacked < _SHARE * own:
        return Remedy(f"accuracy is {own:.1%} under the training attack and {attacked:.1%} under "
                      "the validation attack (catastrophic overfitting)", smaller_step(recipe))
    if clean < _WRECKED * start:
        reason = f"clean accuracy fell from {start:.1%} to {clean:.1%}"
        if recipe.attacks and (recipe.rel_step or 0) > 1:
            return Remedy(reason, smaller_step(recipe), restart=True)
        if first and recipe.lr is None:
            return Remedy(f"{reason} in the first epoch", recipe, 0.2, restart=True)
    return None


def collapsed(recipe: Recipe, best: float, certified: float | None) -> Remedy | None:
    """Return what to change if certified training has lost most of what it certified.

    Args:
        best: the largest share of held-out images that an earlier epoch certified.
        certified: the share after this epoch; None: there is no held-out slice.
    """
    if certified is None or best < _WORTH or certified >= _COLLAPSED * best:
        return None
    return Remedy(f"certified accuracy fell from {best:.1%} to {certified:.1%}", recipe, 0.5)
