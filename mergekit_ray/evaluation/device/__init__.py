"""Evaluation on a device: uploads, arithmetic and downloads side by side."""
