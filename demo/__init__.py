"""`make demo`: two fine-tunes of a real model, merged from S3 to S3 through Ray."""
