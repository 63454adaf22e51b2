"""What makes sibo.py and model.py real: checkpoints, data, scores, training runs and the tools around them."""
