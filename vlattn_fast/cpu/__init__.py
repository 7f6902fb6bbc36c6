"""The CPU kernels: one launcher per operator for csrc/cpu/, called through vlattn_fast/_native.py."""
