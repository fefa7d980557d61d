"""What a conversion will produce and need, settled before any weight is read."""
