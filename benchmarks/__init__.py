"""What is fast and by how much: ours beside its peers, in one run."""
