"""What blocks, training steps and trials cost: counted, traced and simulated."""
