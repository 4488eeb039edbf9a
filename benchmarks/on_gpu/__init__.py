"""The parts of `gpu.py`: what is checked and measured on a device."""
