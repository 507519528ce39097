"""Writes the list of all configuration keys into ``docs/configuration.md``, between its two marks."""

from pathlib import Path

from zephyr_lite.config.keys import keys_as_markdown

BEGIN, END = "<!-- keys: made by python docs/list_keys.py -->", "<!-- end of keys -->"

if __name__ == "__main__":
    path = Path(__file__).parent / "configuration.md"
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{path} lacks the two marks around the list"
    path.write_text(f"{before}{BEGIN}\n\n{keys_as_markdown()}\n{END}{after}", "utf-8")
