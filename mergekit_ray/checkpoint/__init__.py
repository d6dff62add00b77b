"""Safetensors checkpoints: headers and indexes read by range, layouts decided beforehand, shards streamed out."""
