"""An evaluation as plain data, Markdown and HTML."""
