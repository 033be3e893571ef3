"""Reports: results as text for a terminal, HTML for a notebook, and one self-contained page.

To add a form of a result, write a function that takes it and register it with ``as_text``,
``as_html`` or ``as_page`` of :mod:`quantguard.core.rendering`: ``str(result)``,
``result._repr_html_()`` and ``result.save_page()`` call what is registered for the result's class.
"""

from .html import comparison_html, evaluation_html, page
from .text import comparison_text, evaluation_text

__all__ = ["comparison_html", "comparison_text", "evaluation_html", "evaluation_text", "page"]
