"""Models of any kind: walking, calling, recording and changing them, and undoing that."""
