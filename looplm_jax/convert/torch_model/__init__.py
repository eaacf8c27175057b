"""The PyTorch model of every exported folder. It imports torch and transformers, so nothing imports it at the top."""
