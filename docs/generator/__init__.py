"""Render the generated parts of the documentation as Markdown, one module for each kind of text."""
