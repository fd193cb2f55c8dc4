"""GPU and CPU operations of fastprompt. They know tensors, and nothing of CLIP, prompts or data."""
