"""What is built on train.py: the paper's studies, and the benchmark."""
