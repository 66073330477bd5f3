"""From a budget to a plan: error curves, costs, allocation, latency."""
