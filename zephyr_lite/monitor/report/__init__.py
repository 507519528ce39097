"""``report.html``: one self-contained file about a run's stages, or about two runs side by side.

    writer.py    keeps it up to date while a stage is trained
    read.py      what a stage's folder says; tolerates unfinished, old and torn files
    lengths.py   how long the rows are: counted once, at the start
    figures.py   which curves there are;  svg.py draws them
    sections.py  everything else on the page, section by section
    page.py      the whole page;  look.py has its style and its script;  text.py its words and numbers

Everything but the writer reads files only, and imports no torch.
"""
