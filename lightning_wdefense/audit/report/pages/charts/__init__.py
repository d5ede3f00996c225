"""Charts as SVG, drawn without a library: their colours are those of the page, light or dark, and their text stays text."""
