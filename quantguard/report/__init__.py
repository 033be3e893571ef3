"""Show results: text for a terminal, HTML for a notebook, one self-contained page."""

from .html import comparison_html, evaluation_html, page
from .text import comparison_text, evaluation_text

__all__ = ["comparison_html", "comparison_text", "evaluation_html", "evaluation_text", "page"]
