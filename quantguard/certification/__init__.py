"""Certified lower bounds of robustness, by intervals and linear bounds through one model graph.

`certifier` holds the public function, `propagation` carries bounds through the graph,
`branch_and_bound` splits what they leave undecided, `training_propagation` is the differentiable
form that training uses. `graph/` traces a model and checks the trace against the model that runs;
`rules/` says what each operation makes of bounds.

To certify (and train through) another operation, add a rule to the file of its family in `rules/`:
its docstring says how.
"""

from .certificate import Certificate
from .certificate_report import certificate_html, certificate_text

__all__ = ["Certificate", "certificate_html", "certificate_text"]
