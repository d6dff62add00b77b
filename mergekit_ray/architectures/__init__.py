"""What tensor names mean, read off the headers: layers, embeddings, heads, buffers. No table of model families."""
