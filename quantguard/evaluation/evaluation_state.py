"""State of a running evaluation, which a run directory saves after every attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..core.distributed import distributed
from ..core.errors import SpecError
from ..core.file_io import indices, mask_of, replacing
from ..core.run_dir import arrays
from ..data.images import Images
from .attack_result import AttackResult

# Names of the settings for the error message.
_SETTING_NAMES = {"predictions": "the model's predictions", "suite": "the attacks",
                  "images": "the images", "certified": "the certified images"}


class EvaluationState:
    """Results and adversarials so far.

    Args:
        path: the file to save to and to resume from; None: nothing is saved.
        settings: of the evaluation; a file with other settings is an error.
        images: what is attacked.
        correct: (N,) images that are classified correctly without an attack.

    Attributes:
        survived: (N,) images that no attack has broken yet.
        results: of the attacks that are done.
        adversarials: (N, ...) what broke an image; for a survivor, what came nearest to that.
        margins: (N,) the margin at the adversarials.
        ended: the time limit of a run that finished within it, in seconds; 0: none has.

    Raises:
        SpecError: the file has other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], images: Images,
                 correct: np.ndarray) -> None:
        self.path, self.settings = path, settings
        self.survived = correct.copy()
        self.results: list[AttackResult] = []
        self.ended = 0.0
        self.adversarials = images.pixels.cpu().numpy().copy()
        self.margins = np.full(len(correct), -np.inf)
        if path is not None and path.exists():
            self._read(path, len(correct))

    def _read(self, path: Path, n: int) -> None:
        """Resume from a file."""
        state, adversarials, margins = arrays(path, "state", "adversarials", "margins")
        saved = json.loads(str(state))
        different = sorted(k for k in {*saved["settings"], *self.settings}
                           if saved["settings"].get(k) != self.settings.get(k))
        if different:
            names = ", ".join(_SETTING_NAMES.get(k, k) for k in different)
            raise SpecError(f"{path.parent} has an evaluation with other settings",
                            why=f"Different: {names}.",
                            fix="Use another run directory, or delete this one.")
        self.adversarials, self.margins = adversarials, margins
        self.ended = saved.get("ended", 0.0)
        for row in saved["results"]:
            row |= {k: mask_of(row[k], n) for k in ("attacked", "broken")}
            self.results.append(AttackResult(**row))
            self.survived &= ~self.results[-1].broken

    def add(self, result: AttackResult) -> None:
        """Add the result of an attack, and save."""
        self.results.append(result)
        self.survived &= ~result.broken
        self._save()

    def end(self, limit: float) -> None:
        """Record that nothing more fits within this time limit, and save."""
        self.ended = max(self.ended, limit)
        self._save()

    def _save(self) -> None:
        if self.path is None or not distributed().is_main:
            return
        rows = [{**vars(r), "attacked": indices(r.attacked), "broken": indices(r.broken)}
                for r in self.results]
        with replacing(self.path) as beside:
            np.savez(beside, adversarials=self.adversarials, margins=self.margins,
                     state=json.dumps({"settings": self.settings, "results": rows,
                                       "ended": self.ended}))
