"""Show results: text for a terminal, HTML for a notebook, one self-contained page."""

from .html import certificate_html, comparison_html, evaluation_html, page
from .text import certificate_text, comparison_text, evaluation_text

__all__ = ["certificate_html", "certificate_text", "comparison_html", "comparison_text",
           "evaluation_html", "evaluation_text", "page"]
