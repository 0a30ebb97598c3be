"""The checks of the doctor by theme, and what they read of the machine."""
