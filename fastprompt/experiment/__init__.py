"""Whole experiments: from a folder of images to a tested run, and what the run is used for.

``config`` is read by the command line before anything heavy is imported, so nothing is imported here.
"""
