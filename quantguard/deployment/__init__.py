"""Exported files and the runtimes that run them. Nothing is here yet."""
