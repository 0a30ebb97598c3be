"""Lengths of rows: those that a data set has, and those that fit."""
