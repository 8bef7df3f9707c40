"""STAND-IN for oneCCL's bindings: DeepSpeed 0.14 imports them before it uses a CPU, and nothing from them."""
