"""Where people already are: other libraries' tensors and formats. Each module needs its library installed."""
