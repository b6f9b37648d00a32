"""Reduce the tokens of open_clip's image towers."""
