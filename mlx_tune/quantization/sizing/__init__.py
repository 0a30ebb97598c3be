"""A size to be met: which layers get how many bits."""
