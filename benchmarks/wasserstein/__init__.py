"""The Wasserstein attack: its strength against published ones, and what a step costs."""
