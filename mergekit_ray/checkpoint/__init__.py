"""Safetensors checkpoints: headers and indexes, layouts decided beforehand, shards streamed out."""
