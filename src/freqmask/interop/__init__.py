"""The backbone on its way to and from other software."""
