"""What made the embedded models and their split: drawn scenes, questions, architectures, packed training, scoring.

The scripts beside this folder use it; nothing of it is in the wheel.
"""
