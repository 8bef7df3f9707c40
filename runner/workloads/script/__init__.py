"""Test `script`: a program of the user's, which every rank of the cell starts; nothing of ours is imported into it."""
