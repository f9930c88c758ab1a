"""Fine-tuning: a backbone with a fresh head becomes a classifier; all its weights learn."""
