"""The built-in demonstration: rendered scenes, the small CLIP that was trained on them, and the experiment that runs on both."""
