"""What the field runs today, transcribed plainly: the oracles of the tests and the peers of the benchmarks.

Nothing here imports tests, benchmarks or fastprompt.
"""
