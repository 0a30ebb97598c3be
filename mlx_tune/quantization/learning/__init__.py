"""Codes and scales found for layers: by their weights, or from what a calibration shows of their inputs."""
