"""Semantic segmentation: UperNet trained on a backbone, and how well it names every pixel."""
