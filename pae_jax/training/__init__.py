"""Training of the newest task: the train state, the steps, the loop, evaluation."""
