"""What explore.ipynb shows."""
