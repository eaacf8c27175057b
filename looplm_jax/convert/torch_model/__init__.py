"""The PyTorch model of exported folders. It imports torch and transformers, so no module imports it at the top."""
