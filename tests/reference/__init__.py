"""The equations, naively: float64, one function per equation, never fast. For tests only."""
