"""Repositories of the Hugging Face Hub."""

from mergekit_ray.storage.hub import source as source  # registers the scheme for reading
from mergekit_ray.storage.hub import store as store  # and for writing
