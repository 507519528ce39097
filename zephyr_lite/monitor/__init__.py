"""What a person sees of a run: a live panel, plain lines or JSON while it trains, and ``report.html``."""
