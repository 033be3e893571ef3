"""Default settings of each recipe."""

from __future__ import annotations

from typing import Any

PRECISIONS, INITS = ("float32", "bfloat16"), ("keep", "interval")

# Inner attack of certified training where the intervals cover only part of the radius (box < 1).
SMALL_BOX: dict[str, Any] = {"steps": 8, "rel_step": 0.5, "noise": 1.0,
                             "sharpness": (2.0, 4.0, 8.0, 16.0)}

DEFAULTS: dict[str, dict[str, Any]] = {
    # Fine-tuning without an attack.
    "clean": {
        "steps": 0,
        "rel_step": 0.0,
        "noise": 0.0,
        "sharpness": None,
        "stability": 0.0,
        "range_factor": 1.0,
        "beta": 0.0,
        "bit_schedule": (),
    },
    # Madry et al. 2018, arXiv:1706.06083; the inner attack goes through the softened model.
    # benchmarks/hardening.py measures each setting.
    "pgd": {
        "steps": 3,
        "rel_step": 0.5,
        "noise": 1.0,
        "sharpness": (2.0, 4.0, 8.0),
        "stability": 1.0,
        "range_factor": 0.4,
        "beta": 0.0,
        "bit_schedule": (),
        "input_bits": 8,
    },
    # Zhang et al. 2019, arXiv:1901.08573, equation 5: clean cross-entropy plus beta times the
    # divergence between the answers on clean and on attacked images.
    "trades": {
        "steps": 3,
        "rel_step": 0.5,
        "noise": 1.0,
        "sharpness": (2.0, 4.0, 8.0),
        "stability": 1.0,
        "range_factor": 0.4,
        "beta": 6.0,
        "bit_schedule": (),
        "input_bits": 8,
    },
    # de Jorge et al. 2022, arXiv:2202.01181: noise, one step of eps, no projection. They use noise
    # of 2 eps at eps 8/255. At 0.1 on Fashion-MNIST that cost 2 points of clean accuracy and did
    # not improve robust accuracy.
    "nfgsm": {
        "steps": 1,
        "rel_step": 1.0,
        "noise": 1.0,
        "sharpness": None,
        "stability": 0.0,
        "range_factor": 1.0,
        "beta": 0.0,
        "bit_schedule": (),
    },
    # Certified training by intervals (Gowal et al. 2018, arXiv:1810.12715): the loss is that of
    # the worst-case logits alone. benchmarks/certify.py measures each setting on Fashion-MNIST.
    "ibp": {
        "steps": 0,
        "rel_step": 0.0,
        "noise": 0.0,
        "sharpness": None,
        "stability": 0.0,
        "range_factor": 0.75,
        "beta": 0.0,
        "bit_schedule": (),
        "weight_decay": 0.0,
        "ema": 0.0,
        "init": "interval",
        "input_bits": 8,
    },
}
COMMON_DEFAULTS: dict[str, Any] = {"weight_decay": 5e-4, "ema": 0.995, "init": "keep"}
