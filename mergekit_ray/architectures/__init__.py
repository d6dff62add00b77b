"""What tensor names mean: layers, embeddings, heads. Read off the headers, without a table of model families."""
