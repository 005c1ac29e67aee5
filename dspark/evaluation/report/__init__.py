"""The report of an evaluation: figures as data, then as Markdown, HTML and pictures."""
