"""What is measured while training, and the guard that watches it."""
