"""S3 and what speaks its protocol."""

from mergekit_ray.storage.s3 import store as store  # registers the scheme
