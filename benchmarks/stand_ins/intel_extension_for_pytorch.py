"""STAND-IN for Intel Extension for PyTorch: DeepSpeed 0.14 imports it before it uses a CPU, and nothing from it."""
