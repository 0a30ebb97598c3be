"""The cost of quantization, measured: accuracy, speed, and the report of both."""
