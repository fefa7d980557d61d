"""The report of a conversion: JSON, an HTML page and the model card."""
