"""Files that the library writes: those that wait on disk, and those that a killed process leaves behind."""
