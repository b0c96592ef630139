"""RDEP: where each (token, k) pair lies, and how its row gets there and back."""
