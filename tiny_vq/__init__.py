"""The image tokenizer: a VQ-VAE, its training, and the loader of a trained one."""
