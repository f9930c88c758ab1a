"""What every trained thing needs, whatever its method: recipe, checkpoints, the run folder, progress, the plan."""
