"""Everything to be learnt from a machine with a GPU, in one command for those who have it for minutes only."""
