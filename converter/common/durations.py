"""Lengths of time in words."""


def duration(seconds: float) -> str:
    """Describe a length of time: 8.4 s, 5 min, 6 h 30 min."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
