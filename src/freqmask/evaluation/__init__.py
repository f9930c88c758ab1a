"""How good a backbone is, measured on images with labels."""
