"""Reports, tables and lists of runs. Everything is read from the files of a run folder: no torch, no model."""
