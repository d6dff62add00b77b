"""Carrying plans out: evaluation, workers, the driver, executors, publishing."""
