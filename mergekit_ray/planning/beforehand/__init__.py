"""What is computed before the rest of a plan, beside the output: long approximations, and stages that need room."""
