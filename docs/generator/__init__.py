"""What `docs/generate.py` is made of: each module renders one kind of text as Markdown."""
