"""Pages for people: what a page holds, charts as SVG, pictures as PNG, and its text in HTML and in Markdown."""
