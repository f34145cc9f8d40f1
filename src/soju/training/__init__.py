"""What every training run shares: arguments, schedules, callbacks, checkpoints that can be trusted."""
