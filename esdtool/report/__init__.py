"""Present results to people: tables, terminal, HTML, Markdown and figures."""
