"""Entry point of the command line: the group ``quantguard`` with its verbs."""

from __future__ import annotations

import click

from .conversion_commands import convert, inspect
from .evaluation_commands import certify, compare, evaluate, sensitivity
from .group import Group
from .training_commands import ablate, demo, harden


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torch-quantguard", prog_name="quantguard")
def main() -> None:
    """Low-bit activations for a trained classifier, and a robustness figure to trust.

    MODEL is a file (torch.save of a module or, with --arch, of weights; a .qg file), a folder of
    transformers (hf:DIR), or an arch spec: torchvision:NAME, timm:NAME, package.module:factory or
    file.py:factory. An arch spec may end in arguments: ?num_classes=3. FILE?weights=KEY selects one
    of several sets of weights in a file.
    """


for _verb in (inspect, convert, harden, ablate, evaluate, compare, certify, sensitivity, demo):
    main.add_command(_verb)
