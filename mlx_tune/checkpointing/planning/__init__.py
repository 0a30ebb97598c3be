"""Which blocks to checkpoint: costs, predictions, and the steps that are measured."""
