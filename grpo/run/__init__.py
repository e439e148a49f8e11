"""What a run is on disk and in a shell: directory, state, checkpoints, log, signals, machine. No word of learning."""
