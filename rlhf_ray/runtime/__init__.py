"""The only home of ``import ray``: clusters, crews of actors, and Ray Train."""

from rlhf_ray.runtime.environment import prepare_environment

prepare_environment()
