"""A small compiled library for CPUs: generation's pass, and attention and GELU of training; plain torch serves where it
can't be compiled.
"""

from rlhf_ray.native.build import NativeUnavailableError, build_problem, library

__all__ = ["NativeUnavailableError", "build_problem", "library"]
