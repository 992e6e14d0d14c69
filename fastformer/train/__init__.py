"""Floor 7: training: state, optimiser, step, loop, evaluation, checkpoints and logs, a file each."""
