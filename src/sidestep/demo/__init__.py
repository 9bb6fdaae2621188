"""What `sidestep demo` runs: real data, a real encoder, and a small vision Transformer that comes with the package."""
