"""Generation on a CPU by one small compiled pass; plain torch serves where it can't be compiled."""

from rlhf_ray.generation.native.build import NativeUnavailableError, build_problem
from rlhf_ray.generation.native.model import NativeModel, native_problem

__all__ = ["NativeModel", "NativeUnavailableError", "build_problem", "native_problem"]
