"""Labelled tiles: their classes, where they come from, how they are varied and how painted ones are written."""
