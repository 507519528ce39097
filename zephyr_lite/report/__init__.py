"""``report.html``: one self-contained file about a run's stages."""
