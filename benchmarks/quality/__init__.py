"""How accurate a converted model is, in comparison with other methods and with the paper."""
