"""What is reported of a conversion: JSON, the HTML page and the model card."""
