"""fastprompt: fast, exact prompt learning for CLIP-like models."""
