"""Merging experts into one model.

``stage.merge`` is the stage. ``base`` says what a merge method is; ``methods`` has a file for each.
"""
