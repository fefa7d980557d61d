"""What a conversion produces and what it costs, computed from the model's headers."""
