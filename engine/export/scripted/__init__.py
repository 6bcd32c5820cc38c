"""The path from a scan to its labels in the part of Python that TorchScript compiles."""
