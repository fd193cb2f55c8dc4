"""The built-in demonstration: rendered scenes, the small CLIP trained on them, and the experiment that runs on both."""
